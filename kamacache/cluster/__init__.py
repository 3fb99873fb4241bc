"""Which node owns a key, and how to reach it: ring, membership, peer links, discovery.

*Invariant*: of these modules `link` alone imports grpc, and `discovery.etcd` what it needs.
"""
