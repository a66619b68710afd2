"""Snapshots: where the root file systems of containers and the layers of images are kept."""
