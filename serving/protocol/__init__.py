"""The wire formats of gRPC and what protoc makes of them; inference.proto says how. Nothing here is written by hand but *.proto."""
