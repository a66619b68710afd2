"""Building images: the graph of a Dockerfile's steps, its cache, and what carries the steps out (BuildKit's role)."""
