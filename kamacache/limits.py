"""Every bound of the system in one place: sizes, counts, waits and retries.

*Process*: all. Units are the last word of each name.
"""

from __future__ import annotations

from typing import Final

# Keys and values.
KEY_BYTES_MAX: Final = 1024
VALUE_BYTES_CEILING: Final = (1 << 24) - 1  # 24 bits of a record's header; geometry sets less
TTL_MS_MAX: Final = 10 * 365 * 86_400_000

# Frames over Unix sockets.
FRAME_BYTES_MAX: Final = 32 << 20
BATCH_KEYS_MAX: Final = 4_096  # keys in one frame; clients split larger batches
BATCH_BYTES_SOFT: Final = 8 << 20  # a batch frame is cut when its payload passes this

# Connections of one process to one worker, and of one worker.
LINKS_PER_WORKER_MAX: Final = 64
CONNECTIONS_MAX: Final = 4_096
REQUESTS_PER_CONNECTION_MAX: Final = 1_024
WRITE_BUFFER_BYTES_MAX: Final = 8 << 20  # replies a client has not read: no more requests then
UNREAD_BYTES_MAX: Final = 64 << 20  # replies a client has not read: the connection ends
PARTIAL_BYTES_MAX: Final = 256 << 20  # of half frames, in a worker and in a front

# Waits, in seconds unless the name says otherwise.
CONNECT_TIMEOUT_S: Final = 1.0
LINK_RESTART_WAIT_S: Final = 1.5  # a worker that died is back within 1 s
LINK_RETRY_FIRST_S: Final = 0.002
LINK_RETRY_MAX_S: Final = 0.05
REPLY_GRACE_S: Final = 0.1  # the worker tells who is late; the link gives up this much later
FRAME_STALL_S: Final = 10.0  # for a half frame to become whole
UNREAD_STALL_S: Final = 10.0  # for a client to read on once it is paused
LOG_EVERY_S: Final = 10.0  # for one kind of repeated failure
LOG_KINDS_MAX: Final = 1_024  # kinds that one log remembers
LOAD_TIMEOUT_S: Final = 30.0  # default of a group's load_timeout
CALL_TIMEOUT_MAX_S: Final = 3_600.0
NEAR_VALID_MS_MAX: Final = 5_000
SERVE_UNTIL_AHEAD_MS: Final = 2_000
SERVE_UNTIL_BELIEVED_MS: Final = 100  # a reader looks at the word again; a node boots slower
SERVE_UNTIL_EVERY_S: Final = 0.5
COUNTER_FLUSH_S: Final = 1.0
MAINTAIN_EVERY_S: Final = 1.0  # how often a writer frees expired segments and publishes counts
REATTACH_EVERY_S: Final = 0.5  # how often a process without a node looks for one
DRAIN_TIMEOUT_S: Final = 10.0
BOOT_TIMEOUT_S: Final = 60.0
RESTART_BACKOFF_FIRST_S: Final = 0.1
RESTART_BACKOFF_MAX_S: Final = 10.0
PULSE_EVERY_S: Final = 5.0  # how often the supervisor pings each worker
HUNG_WORKER_S: Final = 60.0  # a worker whose loop answers no ping for so long is killed
BOOT_FAILURES_MAX: Final = 3  # deaths before ready, in a row, that end the node with exit code 3
NOTIFY_UNSENT_MAX: Final = 16  # messages that wait for the service manager to have room
NOTIFY_AGAIN_S: Final = 0.1  # to try again
NOTIFY_STATUS_CHARS_MAX: Final = 900  # of up to 4 bytes; systemd ignores messages above 4 KiB
NOTIFY_WATCHDOG_S_MIN: Final = 0.1  # between two signs of life, whatever is asked for
NOTIFY_EXTEND_EVERY_S: Final = 2.0  # how often a slow start or end asks for more time
NOTIFY_EXTEND_S: Final = 10.0  # that it asks for
SLOW_LOAD_MS_MAX: Final = 3_600_000  # that --slow-load-ms may be set to
RELOAD_EVERY_S: Final = 0.2  # SIGHUPs that come faster are taken together
SECRETS_LOOK_EVERY_S: Final = 10.0  # how often files of certificates and tokens are looked at
LOG_LINE_BYTES_MAX: Final = 4_096  # PIPE_BUF: what a pipe takes whole or not at all
LOG_FIELD_CHARS_LEAST: Final = 32  # to which a field is cut before others are left out
SECRETS_SETTLE_S: Final = 1.0  # for which they must stay as they are before they are taken up

# A warm restart.
KEPT_NOTE_BYTES_MAX: Final = 4 << 20  # of the note on what a node left
WARM_RESTART_DOWNTIME_S: Final = 60.0  # shards of a node that stopped longer ago are thrown away
WARM_RESTART_DOWNTIME_MAX_S: Final = 3_600.0  # that this may be set to
WARM_SETTLE_S: Final = 10.0  # for the other nodes to tell what they wrote meanwhile
WARM_REACH_S: Final = 3.0  # for all of them to be reached
WARM_ASK_EVERY_S: Final = 0.05
WARM_ASKED_S: Final = 1.0  # for one answer
WARM_MARGIN_MS: Final = 2_000  # that a node must have collected writes before another left
FAREWELL_S: Final = 1.0  # for a worker that ends: until all nodes have heard of its last writes
FAREWELL_BYTES_MAX: Final = 4 << 20
NODES_LEFT_MAX: Final = 1_024  # nodes that left the cluster, which are remembered
FLUSH_SLOTS: Final = 1 << 16  # dropped in one turn of the loop by a worker that serves nobody yet

# Peers: the other nodes of a cluster.
MEMBERS_MAX: Final = 1_024  # nodes of one cluster
WEIGHT_MAX: Final = 64  # of one node on the ring
VIRTUAL_NODES: Final = 2_048  # of a node of weight 1
PEER_CONNECT_S: Final = 1.0  # for a link to be dialled and greeted
PEER_PING_EVERY_S: Final = 0.3  # on a link that is otherwise silent
PEER_SILENCE_S: Final = 1.2  # nothing heard for so long: the link has failed
PEER_WRITE_S: Final = 1.2  # an owner that gets a write later than this refuses it
PEER_RETRY_FIRST_S: Final = 0.02
PEER_RETRY_MAX_S: Final = 0.5  # jittered down to half
PEER_RETURN_S: Final = 1.0  # that a node which comes back with its memory waits to be asked again
PEER_STRANGE_S: Final = 5.0  # a peer first reached later than this drops what is older than that
RECENT_ITEMS_MAX: Final = 20_000  # keys written of late, of which nodes that join are told
PEERS_DEPARTED_MAX: Final = 8  # nodes that left, for which invalidations are still collected
PEER_REQUESTS_MAX: Final = 4_096  # under way on one link
PEER_UNSENT_BYTES_MAX: Final = 64 << 20  # of requests that wait on one link
PEER_BATCH_BYTES: Final = 1 << 20  # frames of one link message, unless a single one is larger
PEER_PEEK_S: Final = 0.5  # for a node to say what it holds of a key that it lost
PEER_TRIES_MAX: Final = 3  # nodes asked for one key before it is loaded where it was asked for
INVALIDATIONS_MAX: Final = 100_000  # keys that wait for one peer, in one worker
INVALIDATION_BYTES_MAX: Final = 16 << 20  # of their keys
OWED_FILE_BYTES: Final = 256 << 10  # what one worker owes to nodes that are away, for its successor
OWED_HEAD_BYTES: Final = 512
OWED_NAMES_BYTES: Final = 15 << 10  # of nodes that are to drop all
PEER_REFUSED_RETRY_S: Final = 10.0  # to a node that no waiting mends: ourselves, another format
PEER_LOOK_EVERY_S: Final = 0.05  # how often a link looks at its deadlines and its silence
PEER_STREAMS_MAX: Final = 4_096  # links of other nodes' workers to one front
PEER_DRAIN_S: Final = 1.0  # for a peer to say that it knows that this node drains
PEER_TELL_S: Final = 5.0  # for a peer to answer an invalidation, which is else told again
HANDOFF_S: Final = 60.0  # for which a node that gained keys asks the one that had them
SWEEP_SLOTS: Final = 512  # looked at in one turn of the worker's loop
SWEEP_EVERY_S: Final = 0.01
MEMBERSHIP_LOOK_EVERY_S: Final = 0.05  # how often a role looks at the membership's number
DISCOVERY_FIRST_S: Final = 3.0  # for which a node that starts waits for its first list of peers
DISCOVERY_LEAVE_S: Final = 2.0  # for a node that drains to leave the source of peers
DISCOVERY_WRITE_AGAIN_S: Final = 1.0  # after a membership could not be written
DISCOVERY_TIMEOUT_S: Final = 2.0  # for one answer of a source of peers
DISCOVERY_RETRY_FIRST_S: Final = 0.1  # after a source failed; doubled with each failure
DISCOVERY_RETRY_MAX_S: Final = 5.0  # jittered down to half
DISCOVERY_SERVERS_MAX: Final = 16  # of one source, tried one after the other
DISCOVERY_BYTES_MAX: Final = 4 << 20  # of one list
DISCOVERY_FILE_EVERY_S: Final = 0.5  # how often a file of peers is looked at
DISCOVERY_FILE_SETTLE_S: Final = 0.1  # for which it must stay as it is before it is read

# The HTTP role.
HTTP_CONNECTIONS_MAX: Final = 800  # one that comes beyond is told so and closed
HTTP_REQUESTS_MAX: Final = 512  # under way at once; more are answered with 503
HTTP_HELD_BYTES_MAX: Final = 256 << 20  # of values that are being received or sent
HTTP_PIECE_BYTES: Final = 256 << 10  # of a value, handed to a connection at once
HTTP_REQUEST_S: Final = 30.0  # for a request, once begun, to arrive whole
HTTP_KEEP_ALIVE_S: Final = 30  # that a connection may stay idle
HTTP_PARAMETERS_MAX: Final = 16  # in one query
READY_PING_S: Final = 1.0  # for every worker to answer /readyz's ping
READY_EVERY_S: Final = 0.2  # /readyz asks the workers again

# The status page.
HISTORY_S: Final = 600.0  # of which the charts show points
HISTORY_EVERY_S: Final = 2.0  # between two points while somebody looks
HISTORY_IDLE_EVERY_S: Final = 10.0  # and while nobody does
HISTORY_LOOKED_S: Final = 30.0  # since the last question: somebody looks
HISTORY_POINTS_MAX: Final = 301
RECENT_S: Final = 60.0  # over which the rates of groups, peers and roles are taken
STATUS_PEERS_MAX: Final = 256  # that the page shows, those in trouble first
STATUS_NOTES_MAX: Final = 24  # sentences of what is wrong
STATUS_CHANGES_MAX: Final = 60  # that are kept of what happened of late

# What is measured. Bounds of histograms in seconds; one more bucket has all above the last.
LOAD_SECONDS_BUCKETS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
CALL_SECONDS_BUCKETS: Final = (
    *(0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
PEER_METERS_MAX: Final = 64  # nodes that one worker counts apart; what is counted of more is summed
SHARD_SERIES_MAX: Final = 2_048  # shards of all groups: above, their metrics are sums by group
METRICS_GZIP_BYTES: Final = 1_024  # an answer of fewer is not worth compressing
SNAPSHOT_EVERY_S: Final = 1.0  # askers within this time get the same one
WORKER_ASKED_S: Final = 0.8  # for a worker to tell its numbers of now

# Files of secrets and certificates, and TLS.
SECURITY_FILE_BYTES_MAX: Final = 1 << 20
TLS_EXPIRY_WARNING_DAYS: Final = 14  # that a certificate has left: the log says so at each load
TLS_HANDSHAKE_S: Final = 10.0  # for a client to finish its handshake

# Tokens and the peers' secret.
SECRET_CHARS_MIN: Final = 16  # of a token, or of a line of the peers' secret
TOKENS_MAX: Final = 256  # each is compared with what a call presents
TOKEN_NAME_CHARS_MAX: Final = 64
TOKEN_GROUPS_MAX: Final = 256  # that a token names for reading, or for writing
ACCESS_REFUSED_WAIT_S: Final = 0.5  # that who presents an unknown token waits for the refusal
ACCESS_REFUSED_WAITING_MAX: Final = 64  # who wait so in one process; more are refused at once
PEER_SECRET_LINES_MAX: Final = 8
PEER_PROOF_S: Final = 2.0  # for a link to prove that it is one of a node of this cluster
PEER_UNPROVEN_MAX: Final = 512  # links to one front that have not yet
PEER_WORD_BYTES_MAX: Final = 4_096  # of what such a link may say
PEER_RENEW_S: Final = 3.0  # after a reload, for links to prove that they know the new secret

# gRPC calls.
REQUEST_ARRIVES_S: Final = 30.0  # for a call's request, once the call has begun
REQUEST_LOOK_EVERY_S: Final = 0.5
FRONT_CONNECTIONS_MAX: Final = 10_000  # of one front
FRONT_IDLE_S: Final = 1_800  # after which a connection without a call is closed
REFLECTIONS_MAX: Final = 16  # streams of one front that ask what its services are
REFLECTION_S: Final = 30.0  # that such a stream may last
METADATA_BYTES_MAX: Final = 16 << 10  # of one call

# Remote clients.
CLIENT_SEEDS_MAX: Final = 64
CLIENT_JOIN_S: Final = 1.0  # for the first list of members; the seeds are used as they are then
CLIENT_JOIN_NODES: Final = 8  # seeds asked for it side by side
CLIENT_REFRESH_EVERY_S: Final = 5.0  # jittered
CLIENT_REFRESH_EVERY_S_MIN: Final = 0.2  # after failures
CLIENT_PATIENCE_S: Final = 0.5  # silence after which a node is asked for a sign of life
CLIENT_PATIENCE_S_MIN: Final = 0.1
CLIENT_PROBE_S: Final = 1.0  # for that sign
CLIENT_RETRY_FIRST_S: Final = 0.1  # for which a node that was lost is left alone; doubled
CLIENT_RETRY_MAX_S: Final = 2.0  # jittered down to half
CLIENT_TRIES_MAX: Final = 4  # nodes that one call asks for one key
CLIENT_PARTS_MAX: Final = 16  # messages of one call under way
CLIENT_FORK_WAIT_S: Final = 1.0  # that a fork waits for calls that are under way in threads
CLIENT_RETIRE_S: Final = 30.0  # for which a channel nobody uses any more is kept for its calls

# Getters.
LOAD_DEPTH_MAX: Final = 4
LOAD_THREADS: Final = 16  # default of a group's load_threads; each depth has its own budget
LOAD_THREADS_MAX: Final = 256
LOADS_QUEUED_MAX: Final = 4_096
HUNG_THREADS_MAX: Final = 32  # getter threads given up in one worker before it is recycled
RELIEF_THREADS_MAX: Final = 64  # beyond load_threads, where nested loads wait for each other
LOAD_THREAD_IDLE_S: Final = 30.0  # after which an idle getter thread of a single instance ends
HUNG_SWEEP_S: Final = 0.2  # how often an asker of a queued load looks for hung threads
FORK_LOCK_S: Final = 1.0  # how long a fork waits for a thread that changes a private shard
LOADS_ABANDONED_MAX: Final = 3  # loads lost with their event loop before an asker gives up

# Processes.
WORKERS_MAX: Final = 256
FRONTS_MAX: Final = 64
GROUPS_MAX: Final = 256
COUNTER_SLOTS: Final = 1_024  # attached processes of one node whose hits are counted
