"""Images: content, archives, registries, layers."""
