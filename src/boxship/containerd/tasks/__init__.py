"""Running containers: bundles, the shims that hold them, and the service that reaches them."""
