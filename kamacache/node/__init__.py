"""The parent of all: the supervisor, what it forks, and the `Node` that a program starts.

*Process*: the supervisor, and each role up to its ``run``. Imports neither grpc nor the user's app
(a probe child and the workers do that, after their fork) and starts no thread before a fork.
"""
