"""The composition root: entry points, and the only place that sees several services."""
