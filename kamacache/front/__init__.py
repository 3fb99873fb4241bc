"""The front: the process that answers gRPC. `main` runs it; nothing else of it is imported before.

*Invariant*: grpc is imported by `server`, `servicer`, `peers` and `health` only, and those only
after the fork, since a gRPC object that exists before a fork is a hazard in the child.
"""
