"""Every bound of the system, with its unit and its reason. Nothing else in the code is a bare number of this kind."""

from __future__ import annotations

# --- payloads -------------------------------------------------------------------------------------------------

PAYLOAD_MAX_BYTES = 1_048_576
"""One input, output, event payload or memo. Far below RabbitMQ's 16 MiB message and MongoDB's 16 MiB document,
so that a run with several of them still fits; larger things belong in an object store, with a reference here."""

ERROR_TEXT_MAX_CHARS = 20_000
"""Message and trace of one failure: enough for a person, not enough to fill a document with a recursion trace."""

METADATA_MAX_BYTES = 65_536
"""Additional metadata of one run or event: it is copied to every child."""

EXPRESSION_MAX_CHARS = 2_048
"""One CEL expression. Longer ones cost more to compile than anybody can read."""

EXPRESSION_LOOP_DEPTH_MAX = 2
"""Loops (``exists``, ``all``, ``map``, …) inside each other in one expression: a list in the elements of a list."""

EXPRESSION_COPIES_MAX = 8
"""Values that one expression adds up, or makes a list of: in a loop each may double what there is."""

EXPRESSION_VALUES_MAX = 10_000
"""Fields and elements in what an expression is asked about: it is not true of larger data. Reading them takes tens of
milliseconds, and as many turns are what the CEL library takes in a loop before it gives up."""

EXPRESSION_WORK_MAX_BYTES = 128 * 1_048_576
"""Bytes that one evaluation may look at or copy, as `costs` estimates: some tenths of a second, and as much memory.
An expression that may need more for an event is not true of it."""

REGEX_STATES_MAX = 1_000
"""Characters of a regular expression with its repetitions written out: each is a state of the machine that reads."""

NAME_MAX_CHARS = 128
"""Workflow, task, worker, event-key and condition names: they become routing keys (255 bytes at most) and labels."""

NAME_MAX_BYTES = 220
"""The same names in UTF-8: leaves room in 255 bytes for what queues and notices put around them."""

# --- durable log ----------------------------------------------------------------------------------------------

LOG_MAX_ENTRIES = 20_000
"""Operations of one durable task. Replaying more takes seconds and a grant of tens of megabytes."""

LOG_WARN_ENTRIES = 10_000
"""From this length on the scheduler logs a warning at each new entry, so that the limit never comes as a surprise."""

LOG_MAX_BYTES = 8 * 1_048_576
"""Results in the log of one durable task, in UTF-8. A grant carries them all in one message, and RabbitMQ limits a
message to 16 MiB."""

# --- messages -------------------------------------------------------------------------------------------------

BATCH_MAX_ITEMS = 1_000
"""Items in one AMQP message between services: bounds what one redelivery can repeat."""

BATCH_MAX_BYTES = 262_144
"""Bytes gathered into one AMQP message before the next is begun; a single larger item travels alone."""

BULK_MAX_ITEMS = 1_000
"""Runs or events in one bulk call of the SDK; larger lists are cut into several messages, order kept."""

COMMIT_MAX_BYTES = 4 * 1_048_576
"""Bytes of messages in one batch of a service: what they change goes into one bulk write, and the effects of one run
into one document below MongoDB's 16 MiB."""

REPORT_MAX_BYTES = 2 * 1_048_576
"""Payload in the operations of one report of a durable task; more of them travel in several reports."""

RUN_PREFETCH = 2_000
"""Unacknowledged messages a shard may hold: two full batches, so that the next gathers while one commits."""

EVENT_PREFETCH = 256
"""Unacknowledged messages that event-ingest may hold. Anybody may publish events, and RabbitMQ bounds what it hands
out by number alone: this times `PAYLOAD_MAX_BYTES`, 256 MiB, is what they can make it keep in memory."""

# --- events ---------------------------------------------------------------------------------------------------

MATCH_FIELD_SETS_MAX = 16
"""Sets of payload fields that index the waits of one event key: an event is looked up once for each. Conditions
with yet another set share the key without fields, and their expressions are evaluated one by one."""

# --- workers and leases ---------------------------------------------------------------------------------------

HEARTBEAT_INTERVAL_S = 4.0
"""How often a worker says that it lives, and which leases it holds."""

WORKER_SILENT_S = 10.0
"""No grants to a worker that has been silent for this long: two heartbeats missed."""

WORKER_LOST_S = 30.0
"""A worker silent for this long has lost its leases: their tasks are ready again."""

UNCONFIRMED_CHANNEL_S = 10.0
"""How long one channel is used for what nobody confirms, heartbeats among it. RabbitMQ 3.10 refuses for ever what comes
for a quorum queue on a channel that first met it while its leader was dead; a worker must not be lost by that."""

REQUEST_REPEATED_S = 60.0
"""For this long after it took a shard over, a scheduler looks for every requested run in the store: clients publish a
request again for about as long, and its predecessor may have created the run. Its own runs it remembers."""

WORKER_SAVE_INTERVAL_S = 15.0
"""How often a worker's last sign of life is written down, for people and for the next owner of a shard."""

RECLAIM_GRACE_S = 5.0
"""After a ticket was redelivered, its old holder has this long to say that it lives: longer than a heartbeat."""

EXECUTION_GRACE_S = 2.0
"""A worker enforces the execution timeout itself; the scheduler does so this much later, should the worker not."""

SWEEP_INTERVAL_S = 5.0
"""How often a shard looks for what no message told it."""

GRANT_UNSEEN_S = 12.0
"""A lease that its worker's heartbeats do not list this long after the grant never arrived: three heartbeats."""

MAX_LOSSES = 10
"""Times that a task run may lose its worker before it fails: a task that kills its workers must not go on for ever."""

TICKET_REUSE_MAX = 64
"""Grants under one ticket before it must go back to its queue, so that every shard and pool gets its share."""

TICKET_REUSED_MAX_S = 2.0
"""How long one ticket is granted anew: then it must go back as well. Else a shard with tasks of a minute would keep a
slot for an hour, while others have tasks of their own for it."""

TICKET_RETAINED_S = 1.0
"""A ticket for which there is nothing to do may be kept this long for what comes next; below the time after which a
worker asks again."""

TICKET_LOST_S = 30.0
"""A ticket unclaimed for this long while tasks are ready and workers idle counts as lost; a second one is harmless."""

RELEASED_MAX_PER_WORKER = 1_000
"""Tasks of one worker that go on after ``release_slot()``: beyond it the call waits, so they cannot pile up."""

CANCEL_GRACE_S = 1.0
"""A cancelled task sees ``ctx.is_cancelled`` for this long before its coroutine is cancelled."""

# --- defaults that users know ---------------------------------------------------------------------------------

DEFAULT_SLOTS = 100
DEFAULT_DURABLE_SLOTS = 1_000
DEFAULT_SCHEDULE_TIMEOUT_S = 300.0
DEFAULT_EXECUTION_TIMEOUT_S = 60.0
BACKOFF_MAX_S = 86_400
"""The longest delay before a retry when the task does not say: a day."""

# --- services -------------------------------------------------------------------------------------------------

TICK_INTERVAL_S = 1.0
"""The timer ticks every shard this often; deadlines are kept to this precision."""

EVENT_RETENTION_S = 7 * 86_400
"""Events are kept this long for waits that look back. A durable task that took longer since its previous
operation does not see older ones."""

CLOCK_AHEAD_MAX_S = 3_600.0
"""A place in the order of events that is further in the future is no clock's: it does not move the order."""

RUN_CACHE_MAX = 5_000
"""Runs that one shard keeps in memory although nothing of them is ready or running."""
