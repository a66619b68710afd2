"""The engine's REST API from a client's side: connection, streams, and a daemon that is started when it is needed."""
