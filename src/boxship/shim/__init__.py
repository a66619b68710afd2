"""The shim: parent of a container, which outlives the daemon (containerd-shim's role)."""
