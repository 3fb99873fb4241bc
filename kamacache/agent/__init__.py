"""Process: the agent, which looks for the other nodes and publishes who belongs to the cluster."""
