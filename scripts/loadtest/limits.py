"""Every bound of the load test in one place: sizes, counts, waits and what is believed.

*Process*: the load test's own and its load processes. Units are the last word of each name. What
the cache itself bounds (keys, values, batches) is in `kamacache.limits`.
"""

from __future__ import annotations

from typing import Final

# What may be asked for.
PROCESSES_MAX: Final = 256
PROCESSES_ALL_MAX: Final = 512  # of all targets of a comparison
CONCURRENCY_MAX: Final = 4_096  # of one process
THREADS_MAX: Final = 256  # of one process, for clients that only know threads
RATE_MAX: Final = 10_000_000.0  # requests a second, over all processes
DURATION_S_MAX: Final = 86_400.0
DURATION_S_MIN: Final = 0.1
ROUNDS_MAX: Final = 1_000
TARGETS_MAX: Final = 8  # of one comparison
KEYS_MAX: Final = 100_000_000
BATCH_MAX: Final = 4_096
THETA_MAX: Final = 10.0  # of a zipf distribution; beyond it there is only one key
SIGMA_MAX: Final = 5.0  # of a lognormal distribution of sizes
GETTER_MS_MAX: Final = 60_000.0
TIMEOUT_S_MAX: Final = 600.0
SEED_MAX: Final = (1 << 63) - 1
FILE_BYTES_MAX: Final = 1 << 30  # of a trace or a list of sizes, unpacked
TRACE_KEYS_MAX: Final = 50_000_000
TRACE_KEYS_HELD_MAX: Final = 200_000_000  # by all load processes together
SIZES_MAX: Final = 1_000_000  # in a list of sizes
KEYS_LOADED_MAX: Final = 10_000_000  # stored before a warm test
LOADED_BYTES_MAX: Final = 64 << 30  # and their values

# What a load process does at once.
BLOCK_OPERATIONS_MIN: Final = 32  # drawn ahead
BLOCK_OPERATIONS_MAX: Final = 4_096
BLOCK_OPEN_MAX: Final = 256  # in an open loop: drawing takes a moment, in which one may be due
BLOCK_S: Final = 0.05  # about how long a block should last: a hot set that moves is seen in time
OUTSTANDING_MAX: Final = 10_000  # requests of one process under way in an open loop
LOAD_BATCH_KEYS: Final = 256  # keys in one message while the keys are stored
LOAD_BATCH_BYTES: Final = 1 << 20
LOAD_PROGRESS_S: Final = 0.2  # between two words on how many keys are stored
LOAD_FAILURES_MAX: Final = 64  # keys in a row that cannot be stored: the load is given up
LOAD_TIMEOUTS_MAX: Final = 3  # the same, where each has to be waited for
ERROR_PAUSE_FIRST_S: Final = 0.001  # after an error in a closed loop; doubled with each further
ERROR_PAUSE_MAX_S: Final = 0.1
ERROR_CLASSES_MAX: Final = 32  # told apart; the rest is "other"
TURN_OPERATIONS: Final = 32  # after which a task lets the others of its loop go on
CALIBRATION_S: Final = 0.03  # for which a load process measures what it costs itself
CALIBRATIONS_MAX: Final = 20  # times, on a busy machine
CALIBRATION_OPERATIONS: Final = 2_000  # that are enough

# Histograms.
LATENCY_NS_MAX: Final = 3_600_000_000_000  # what took longer is counted as this
LATENCY_DIGITS: Final = 3

# Reports and waits, in seconds.
INTERVAL_S: Final = 0.5  # of one report of one process
INTERVAL_MANY_S: Final = 1.0  # where many processes report
INTERVAL_MANY_PROCESSES: Final = 8
INTERVALS_MAX: Final = 1_200  # kept of one round: longer rounds have longer ones
SLOTS_OPEN_MAX: Final = 4  # whose histograms are kept unpacked
LOOK_S: Final = 0.2  # between two looks of the parent at what goes on
SAMPLE_S: Final = 1.0  # between two looks at the server's processes
REPORT_BYTES_MAX: Final = 16 << 20  # of one line of a load process
STDERR_BYTES_MAX: Final = 16 << 10  # kept of what a load process says when it fails
PROCESS_START_S: Final = 60.0  # for a load process to import, connect and say so
PROCESS_STOP_S: Final = 5.0  # for a load process to end beyond what its requests may take
START_AHEAD_S: Final = 0.2  # between the parent's word and the first request
START_AHEAD_EACH_S: Final = 0.01  # the same, more for each load process
CHECK_S: Final = 5.0  # for a target to answer before the test
STATS_S: Final = 0.5  # for a local node to say what a load process has read, twice a second
LOAD_STALL_S: Final = 60.0  # without a key stored: the target does not take them
DEAD_AFTER_S: Final = 5.0  # of errors alone: the target has died
PIPE_BYTES: Final = 1 << 20  # so that a load process need not wait for a busy parent
KILL_WAIT_S: Final = 5.0

# What is noted under the results.
GENERATOR_SHARE_NOTED: Final = 0.10  # of an operation's time that was the load test's own
START_DELAY_SHARE_NOTED: Final = 0.10  # of the median latency that came before the start
BEHIND_NOTED_S: Final = 0.2  # that a request was due and had not begun
CLIENT_BUSY_NOTED: Final = 0.9  # of the load processes' time on their processors
NOT_FOUND_NOTED: Final = 0.01  # of the keys asked of a group with a getter
NOTES_MAX: Final = 32
