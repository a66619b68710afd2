"""Layers: reading their tars, making directories or EROFS images of them, and making them of directories."""
