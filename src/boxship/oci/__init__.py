"""The OCI specifications as types: runtime config, image config, manifest, index and reference; no I/O."""
