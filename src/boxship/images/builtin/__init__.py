"""Images that are made of the machine itself and need no registry: `host` and `python`."""
