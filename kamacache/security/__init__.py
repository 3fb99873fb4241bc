"""What a node trusts: its certificates, tokens and the peers' secret. No grpc here.

*Process*: the supervisor and the command check the files before anything is published; the roles
load them. tls: certificates and keys.
"""
