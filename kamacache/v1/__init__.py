"""Generated from proto/kamacache/v1/ by scripts/gen_proto.py: messages and stubs of the gRPC API.

Only `kamacache.front` and programs that are gRPC clients import it, since it imports grpc.
"""
