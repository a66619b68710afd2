"""The OCI specifications as types: runtime config, state and features, image config, manifest and index; no I/O."""
