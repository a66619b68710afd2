"""What containerd knows of things, in one SQLite database: whose they are, their labels, and what keeps them from collection."""
