"""What both ends of a worker's Unix socket share: frames and messages."""
