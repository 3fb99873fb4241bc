"""The HTTP process: REST over the node's groups, health and readiness."""
