"""Typed kernel primitives, with no knowledge of containers."""
