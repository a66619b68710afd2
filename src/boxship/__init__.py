"""boxship: containers in Python, each layer speaking the standard's own protocol."""

__version__ = "0.1.0"
