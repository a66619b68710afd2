"""The endpoints of the Docker Engine API, by subject."""
