"""The Docker engine's role."""
