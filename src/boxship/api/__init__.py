"""The seams between layers, one module per standard interface."""
