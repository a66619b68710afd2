"""The OCI runtime's command line as an interface: create, start, exec, kill, delete ..."""
