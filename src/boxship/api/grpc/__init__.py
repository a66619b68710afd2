"""gRPC over HTTP/2, the server side (`boxship.api.grpc.server`). Clients use grpcio."""
