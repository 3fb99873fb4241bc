"""The run directory: where a node says that it runs, and where processes meet its shared memory.

*Process*: all. Ground floor: files, locks and mapped words; no sockets, no asyncio, no shard::

    DIR/supervisor.lock          lockf by the supervisor: one node per run directory
    DIR/node.json                what runs here, written when the shards exist
    DIR/<epoch>/worker-<i>.sock  where worker i listens
    DIR/<epoch>/live.json        the settings that a reload may change
    DIR/<epoch>/roster.json      which processes run
    SHM/<epoch>/control          serve-until and the like, one word each
    SHM/<epoch>/counters         hit counters of attached processes
    SHM/<epoch>/<group>-<i>.*    the shards

SHM is ``<shm root>/kamacache-<uid>-<hash of DIR>``; an epoch is one life of the supervisor, so
nothing that a crashed node left can be taken for a file of the one that runs.
"""
