"""The OCI runtime: create, start, exec, kill, delete and the boxrun command line."""
