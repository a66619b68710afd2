"""containerd's gRPC API as an interface: messages, server, client, the table of errors."""
