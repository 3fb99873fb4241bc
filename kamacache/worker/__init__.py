"""The process that owns a shard: serves its Unix socket, runs getters, writes the shard."""
