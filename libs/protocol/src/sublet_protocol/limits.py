"""The bounds that several parts must agree on or that users can reach, each with its unit and its reason.

The relations between them are asserted at the end. Timings and bounds of a single module (intervals of polling,
backoff, sizes of caches) are constants of that module.
"""

from __future__ import annotations

HARD_MAX_BYTES = 16 * 1_048_576
"""The default limits of RabbitMQ for a message and of MongoDB for a document."""

# --- payloads -------------------------------------------------------------------------------------------------

PAYLOAD_MAX_BYTES = 1_048_576
"""One input, output, event payload or memo. Far below `HARD_MAX_BYTES`, so that a run with several of them still fits.
Store larger data elsewhere and pass a reference."""

ERROR_TEXT_MAX_CHARS = 20_000
"""Message and trace of one failure, so that the trace of a deep recursion does not fill the document of a run."""

METADATA_MAX_BYTES = 65_536
"""Metadata of one run or event. It is copied to every child."""

EXPRESSION_MAX_CHARS = 2_048
"""One CEL expression. Longer expressions take long to compile and cannot be read by people."""

EXPRESSION_LOOP_DEPTH_MAX = 2
"""Depth of nested loops (``exists``, ``all``, ``map``, …) in one expression."""

EXPRESSION_COPIES_MAX = 8
"""Values that one expression adds or puts into a list. In a loop each may double the size of the data."""

EXPRESSION_VALUES_MAX = 10_000
"""Fields and elements in the data of one evaluation; an expression is not true for larger data. Reading so many values
takes tens of milliseconds. The CEL library stops a loop after as many iterations."""

EXPRESSION_WORK_MAX_BYTES = 128 * 1_048_576
"""Bytes that one evaluation may read or copy, as `cel.cost` estimates them: some tenths of a second. An expression is
not true for an event for which it may need more."""

REGEX_STATES_MAX = 1_000
"""Characters of a regular expression with its repetitions written out. Each is a state of the matcher."""

NAME_MAX_CHARS = 128
"""Workflow, task, worker, event-key and condition names. They become parts of routing keys and labels of metrics."""

NAME_MAX_BYTES = 220
"""The same names in UTF-8. A routing key has at most 255 bytes, and queues and notices add a prefix."""

# --- durable log ----------------------------------------------------------------------------------------------

LOG_MAX_ENTRIES = 20_000
"""Entries in the log of one durable task. A replay of more entries takes seconds."""

LOG_WARN_ENTRIES = 10_000
"""The scheduler logs a warning at each new entry from this length on, so that the limit can be avoided in time."""

LOG_MAX_BYTES = 8 * 1_048_576
"""Bytes of all results in the log of one durable task, in UTF-8. One grant carries all of them."""

# --- messages -------------------------------------------------------------------------------------------------

BATCH_MAX_ITEMS = 1_000
"""Messages in one AMQP body: the most that one redelivery can repeat."""

BATCH_MAX_BYTES = 262_144
"""Bytes in one AMQP body. A single larger message has a body of its own."""

BULK_MAX_ITEMS = 1_000
"""Runs or events in one bulk message of the SDK. Larger lists are split into several messages, in order."""

COMMIT_MAX_BYTES = 4 * 1_048_576
"""Bytes of messages in one batch of a service. The outbox of a run is part of its document, so it must stay far below
`HARD_MAX_BYTES`."""

REPORT_MAX_BYTES = 2 * 1_048_576
"""Payload bytes in the operations of one report of a durable task. More operations are split into several reports."""

RUN_PREFETCH = 2 * BATCH_MAX_ITEMS
"""Unacknowledged messages that a shard may hold: two full batches, so that one fills while the other is committed."""

EVENT_PREFETCH = 256
"""Unacknowledged messages that event-ingest may hold. Any client can publish events, and RabbitMQ bounds deliveries by
number only. So events can take up to this number times `PAYLOAD_MAX_BYTES` (256 MiB) of memory."""

# --- events ---------------------------------------------------------------------------------------------------

MATCH_FIELD_SETS_MAX = 16
"""Sets of payload fields that index the waits of one event key. An event is looked up once for each set. Conditions
with a further set are indexed without fields, and each of their expressions is evaluated."""

# --- workers and leases ---------------------------------------------------------------------------------------

HEARTBEAT_INTERVAL_S = 4.0
"""Seconds between the heartbeats of a worker, which list its leases."""

WORKER_SILENT_S = 10.0
"""A worker that has been silent for this long gets no grants: it has missed two heartbeats."""

WORKER_LOST_S = 30.0
"""A worker that has been silent for this long has lost its leases: their tasks are ready again."""

UNCONFIRMED_CHANNEL_S = 10.0
"""How long one channel is used for unconfirmed messages, which include heartbeats. RabbitMQ 3.10 drops all messages for
a quorum queue that a channel sends if the leader was dead at its first message. No worker must be lost by that."""

REQUEST_REPEATED_S = 60.0
"""For this long after a takeover, a scheduler looks up every requested run in the store. Clients repeat a request for
about as long, and the former owner may have created the run."""

WORKER_SAVE_INTERVAL_S = 15.0
"""Seconds between two saves of a worker's last heartbeat, for people and for the next owner of a shard."""

RECLAIM_GRACE_S = 5.0
"""After a ticket was redelivered to another worker, its former holder is lost if it sends nothing for this long."""

EXECUTION_GRACE_S = 2.0
"""The worker enforces the execution timeout. The scheduler does so this much later, if the worker has not."""

SWEEP_INTERVAL_S = 5.0
"""Seconds between two sweeps of a shard, which repair what no message reported."""

GRANT_UNSEEN_S = 3 * HEARTBEAT_INTERVAL_S
"""A lease is lost, because its grant never arrived, if the worker's heartbeats have not listed it for this long. The
first heartbeat may have been sent before the grant arrived, and the second may get lost."""

MAX_LOSSES = 10
"""How often a task run may lose its worker before it fails, so that a task that crashes its workers ends."""

TICKET_REUSE_MAX = 64
"""Grants under one ticket before it must be acknowledged, so that every shard gets its share of the slots."""

TICKET_REUSED_MAX_S = 2.0
"""For how long one ticket can be granted again. Otherwise a shard whose tasks take a minute could keep a slot for an
hour while tasks of other shards wait for it."""

TICKET_RETAINED_S = 1.0
"""A ticket may be retained this long for the next ready task. It must be shorter than the time after which a worker
repeats a claim (`CLAIM_REPEATED_S` of the SDK)."""

TICKET_LOST_S = 30.0
"""A ticket is lost if it has not been claimed for this long although tasks are ready and slots are free. If it is not
lost after all, the second ticket is harmless."""

RELEASED_MAX_PER_WORKER = 1_000
"""Tasks of one worker that continue after ``release_slot()``. At this number the call waits, so that they cannot pile
up."""

CANCEL_GRACE_S = 1.0
"""A cancelled task sees ``ctx.is_cancelled`` for this long before its coroutine is cancelled."""

# --- defaults of the SDK ---------------------------------------------------------------------------------

DEFAULT_SLOTS = 100
DEFAULT_DURABLE_SLOTS = 1_000
DEFAULT_SCHEDULE_TIMEOUT_S = 300.0
DEFAULT_EXECUTION_TIMEOUT_S = 60.0
BACKOFF_MAX_S = 86_400
"""The longest delay before a retry unless the task sets one: a day."""

# --- services -------------------------------------------------------------------------------------------------

TICK_INTERVAL_S = 1.0
"""Seconds between two ticks of the timer, which are the precision of deadlines."""

EVENT_RETENTION_S = 7 * 86_400
"""Events are stored this long for waits that look back. A durable task whose previous operation is older does not see
events that were deleted meanwhile."""

CLOCK_AHEAD_MAX_S = 3_600.0
"""No clock is further ahead than this. An event position that is further in the future is wrong and is ignored."""

RUN_CACHE_MAX = 5_000
"""Runs without ready or running tasks that one shard keeps in memory."""

# --- relations ------------------------------------------------------------------------------------------------

assert PAYLOAD_MAX_BYTES < COMMIT_MAX_BYTES < HARD_MAX_BYTES, "a batch must hold any message, a document any outbox"
assert LOG_MAX_BYTES + 2 * PAYLOAD_MAX_BYTES < HARD_MAX_BYTES, "a grant carries the input and the whole durable log"
assert PAYLOAD_MAX_BYTES <= REPORT_MAX_BYTES < HARD_MAX_BYTES, "a report must hold an operation with any payload"
assert BATCH_MAX_BYTES + PAYLOAD_MAX_BYTES < HARD_MAX_BYTES, "a body may end with a message of any payload"
assert LOG_WARN_ENTRIES < LOG_MAX_ENTRIES, "the warning must come before the failure"
assert NAME_MAX_CHARS <= NAME_MAX_BYTES < 255, "a routing key of 255 bytes must hold any ASCII name and a prefix"
assert BULK_MAX_ITEMS <= BATCH_MAX_ITEMS, "one bulk message must fit into one batch of a service"

assert WORKER_SILENT_S > 2 * HEARTBEAT_INTERVAL_S, "one lost heartbeat must not stop grants"
assert WORKER_LOST_S > WORKER_SILENT_S, "a worker must stop getting grants before it loses its leases"
assert WORKER_LOST_S > UNCONFIRMED_CHANNEL_S + HEARTBEAT_INTERVAL_S, "a bad channel must be replaced in time"
assert RECLAIM_GRACE_S > HEARTBEAT_INTERVAL_S, "a live holder of a redelivered ticket must send a heartbeat in time"
assert GRANT_UNSEEN_S > 2 * HEARTBEAT_INTERVAL_S, "the first heartbeat may precede the grant, the second may get lost"
assert EXECUTION_GRACE_S > TICK_INTERVAL_S, "the worker, not the scheduler, should enforce an execution timeout"
assert TICKET_RETAINED_S <= TICKET_REUSED_MAX_S, "a ticket that is retained must still be usable"
