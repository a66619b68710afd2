"""The shim's interface: task service v2 and v3 and the start protocol."""
