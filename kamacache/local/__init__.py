"""The application's side: memory first, then the worker's socket, or all in this process."""
