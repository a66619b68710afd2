"""Measurements against the reference runtimes: `python -m bench`, and `bench.conformance`."""
