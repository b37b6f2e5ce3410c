"""The messages between clients, workers and services.

The body of an AMQP message between our own processes is a JSON array of the records below, each with its tag in ``t``.
User payloads are raw JSON (`msgspec.Raw`), which only the two ends decode. A ticket has an AMQP message of its own,
because its delivery takes a slot of the worker.

=====================  ==========================================================  =============================
exchange               routing key                                                 consumer
=====================  ==========================================================  =============================
``sublet.requests``    ``bucket.00`` … ``bucket.63`` (`topology.bucket_key`)       the shard's scheduler
``sublet.requests``    ``query``                                                   any scheduler
``sublet.workers``     (fanout)                                                    every shard's scheduler
``sublet.inboxes``     an inbox's name                                             one worker, client, scheduler
``sublet.events``      event key (public: plain JSON object, see README)           event-ingest
``sublet.notices``     ``run.completed.<workflow>`` …                              any application
(default)              ``sublet.pool.<pool>.<kind>``: tickets                      the workers of the pool
(default)              ``sublet.timers``, ``sublet.ingest``                        timer, event-ingest
=====================  ==========================================================  =============================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from sublet_protocol import ids
from sublet_protocol.raw_json import NULL
from sublet_protocol.specs import Condition, EventFilter, Groups, SlotKind, WorkflowSpec

RunStatus = Literal["QUEUED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"]


class Record(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="t"):
    """Base of all messages: immutable. Fields that have their default are not encoded.

    Each kind pins its tag, so that a renamed class can still decode messages that are stored or under way.
    """


class TaskError(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a task failed: the exception's class name, its text, and the trace as text."""

    type: str
    message: str
    trace: str = ""
    task_run_id: str = ""


class ParentLink(msgspec.Struct, frozen=True, omit_defaults=True):
    """The task that waits for a child: its task run id and the operation id of its wait ("" for an ordinary task)."""

    task_run_id: str
    operation_id: str = ""


class Trigger(msgspec.Struct, frozen=True, omit_defaults=True):
    """The event that started a run, and the payload of the filter that accepted it."""

    event_id: str
    event_key: str
    filter_payload: dict[str, object] = {}


# --- to a shard: about runs -----------------------------------------------------------------------------------


class RunRequest(Record, frozen=True, tag="run_request"):
    """Create this run. If it exists already, only add the watcher and the parent."""

    run_id: str
    workflow: str
    input: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: dict[str, object] = {}
    priority: int | None = None
    reply_to: str | None = None
    """The inbox that receives the :class:`RunResult`."""
    parent: ParentLink | None = None
    notify_parent: bool = True
    child_index: int | None = None
    child_key: str | None = None
    trigger: Trigger | None = None
    requested_at: float = 0.0


class WatchRun(Record, frozen=True, tag="watch_run"):
    """Send the result of this run to the inbox when it ends, or now if it has ended. For an unknown run the status is
    None."""

    run_id: str
    reply_to: str


class CancelRun(Record, frozen=True, tag="cancel_run"):
    """Cancel a run, or one of its tasks if ``task_run_id`` is given. Runs and tasks that have ended do not change."""

    run_id: str
    task_run_id: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None


class ReplayRun(Record, frozen=True, tag="replay_run"):
    """Run a finished run again: the tasks that failed or were cancelled, and all that depend on them; every task if the
    run completed."""

    run_id: str
    reply_to: str | None = None
    correlation_id: str | None = None


class TimerFired(Record, frozen=True, tag="timer_fired"):
    """A timer is due. ``task_run_id``, ``operation_id`` (a wait key) and ``key`` are those of its :class:`SetTimer`."""

    task_run_id: str
    operation_id: str
    key: str


class EventMatched(Record, frozen=True, tag="event_matched"):
    """An event satisfies a condition. ``operation_id`` is a wait key, ``seq`` the position of the event."""

    task_run_id: str
    operation_id: str
    key: str
    event_id: str
    seq: int
    payload: msgspec.Raw


class ChildFinished(Record, frozen=True, tag="child_finished"):
    """A child run has ended. ``output``: the task's output for a workflow of one task, else an object by task name."""

    task_run_id: str
    operation_id: str
    child_run_id: str
    status: RunStatus
    output: msgspec.Raw = NULL
    error: TaskError | None = None
    at: float | None = None
    """When it ended (Unix seconds)."""


class Tick(Record, frozen=True, tag="tick"):
    """The time (Unix seconds), sent by the timer every `limits.TICK_INTERVAL_S` to every shard."""

    at: float


# --- to every shard: workers ----------------------------------------------------------------------------------


class HeldLease(msgspec.Struct, frozen=True, omit_defaults=True):
    """A lease that a worker holds.

    ``delivered``: the order up to which a resident durable task has received every result (given to the code or not);
    -1 for a task that is not durable or has not started.
    """

    lease: str
    delivered: int = -1


class Hello(Record, frozen=True, tag="hello"):
    """What a worker process can run. Sent when it starts, before its first claim, and in answer to :class:`Ping`."""

    worker: str
    pool: str
    name: str
    inbox: str
    slots: int
    durable_slots: int
    workflows: tuple[WorkflowSpec, ...]
    at: float = 0.0
    """When the process started (Unix seconds). The latest process defines the current versions of its workflows."""
    labels: dict[str, str | int] = {}

    @property
    def actions(self) -> list[str]:
        """The tasks that its pool can run, each as ``<workflow>:<task>``."""
        return [f"{spec.name}:{task.name}" for spec in self.workflows for task in spec.tasks]


class Heartbeat(Record, frozen=True, tag="heartbeat"):
    """A worker is alive and holds these leases. Sent every `limits.HEARTBEAT_INTERVAL_S`, after a reconnect and in
    answer to :class:`Ping`."""

    worker: str
    pool: str
    inbox: str
    slots: int
    durable_slots: int
    leases: tuple[HeldLease, ...] = ()
    draining: bool = False
    taken: int = 0
    durable_taken: int = 0
    """``taken`` and ``durable_taken``: slots in use, by tasks of any shard."""


class Goodbye(Record, frozen=True, tag="goodbye"):
    """A worker has shut down and holds no leases any more."""

    worker: str


# --- to a shard: under a ticket or a lease ---------------------------------------------------------------------


class Claim(Record, frozen=True, tag="claim"):
    """A worker holds this ticket and has a free slot. The answer is a :class:`Grant` or :class:`NoTask`."""

    ticket: str
    worker: str
    pool: str
    kind: SlotKind
    inbox: str
    redelivered: bool = False


class ChildRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The child that a ``run`` operation of a durable task starts."""

    workflow: str
    input: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: dict[str, object] = {}
    priority: int | None = None
    child_key: str | None = None
    child_index: int | None = None


class Operation(msgspec.Struct, frozen=True, omit_defaults=True):
    """A new entry of the durable log: an operation that the code asked for.

    ``operation_id`` is derived from the code's task tree: ``"3"`` is the third operation of the function itself,
    ``"t1.2"`` the second of the second asyncio task that it started, ``"t1.t0.1"`` one level deeper.
    ``fingerprint`` is a digest of the operation's arguments; ``asked`` describes the operation for people.
    """

    operation_id: str
    kind: Literal["wait", "run", "memo"]
    fingerprint: str
    asked: str
    label: str | None = None
    groups: Groups = ()
    """For ``wait``: the conditions (a sleep is one group of one condition)."""
    since: int = 0
    """For ``wait``: events after this position count (see :attr:`Completion.position`)."""
    child: ChildRequest | None = None
    result: msgspec.Raw = NULL
    """For ``memo``: the value."""


class Finished(Record, frozen=True, tag="finished"):
    """The task returned ``output``."""

    lease: str
    ticket: str | None
    output: msgspec.Raw = NULL
    next: bool = False
    """The worker asks for the next task under the same ticket."""


class Failed(Record, frozen=True, tag="failed"):
    """The task raised an exception."""

    lease: str
    ticket: str | None
    error: TaskError
    retryable: bool = True
    next: bool = False


class Evicted(Record, frozen=True, tag="evicted"):
    """The checkpoint of a durable task of which every branch waits. Its code leaves the worker, and the lease ends.

    ``blocked``: for each branch the operation ids that it waits for (all of them). ``delivered``: the highest order of
    a completion that the code has received. ``active_s``: active time of this invocation.
    """

    lease: str
    ticket: str | None
    operations: tuple[Operation, ...]
    blocked: tuple[tuple[str, ...], ...]
    delivered: int
    active_s: float = 0.0
    cause: str = "waiting"
    next: bool = False


class Recorded(Record, frozen=True, tag="recorded"):
    """New operations of a durable task that stays on its worker (it is active, or its eviction policy keeps it)."""

    lease: str
    operations: tuple[Operation, ...]
    waiting: bool = False
    """Every branch waits, so the execution clock stops."""
    active_s: float = 0.0
    number: int = 0
    """Counts the Recorded and TimeoutExtended reports of this lease, from 1, so that a repeated one changes nothing."""


class SlotReleased(Record, frozen=True, tag="slot_released"):
    """``release_slot()`` was called: the worker will acknowledge the ticket, and the lease continues."""

    lease: str


class TimeoutExtended(Record, frozen=True, tag="timeout_extended"):
    """``refresh_timeout()`` was called: add ``by_s`` seconds to the execution timeout of the lease."""

    lease: str
    by_s: float
    number: int = 0
    """As in :class:`Recorded`."""


class GrantDeclined(Record, frozen=True, tag="grant_declined"):
    """The worker did not start a granted task, because it is shutting down. The task is ready again."""

    lease: str
    ticket: str | None


# --- to a worker's inbox ---------------------------------------------------------------------------------------


class Completion(msgspec.Struct, frozen=True, omit_defaults=True):
    """The end of an operation. ``order`` numbers the completed operations of the task: from 1, without gaps."""

    order: int
    result: msgspec.Raw = NULL
    error: TaskError | None = None
    position: int = 0
    """The position from which a following event wait listens: microseconds since 1970, or the seq of the event."""


class LogEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One operation of the durable log in the form that a grant carries. ``done`` is None while it is open.

    A memo has no ``done``; its value is in ``result``.
    """

    operation_id: str
    kind: Literal["wait", "run", "memo"]
    fingerprint: str
    asked: str
    result: msgspec.Raw = NULL
    done: Completion | None = None
    child_run_id: str | None = None
    version: str = ""
    """The workflow version of the code that wrote it."""


class Grant(Record, frozen=True, tag="grant"):
    """The right to run one invocation, and all data that the invocation needs."""

    ticket: str
    lease: str
    workflow: str
    version: str
    task: str
    input: msgspec.Raw
    retry_count: int
    invocation: int
    timeout_s: float
    """Active time left, in seconds."""
    metadata: dict[str, object] = {}
    priority: int = 1
    parents: dict[str, msgspec.Raw] = {}
    """Outputs of the task's parents by task name; ``null`` for a parent without output."""
    skipped: tuple[str, ...] = ()
    errors: dict[str, TaskError] = {}
    """For an on-failure task: the errors of the tasks that failed."""
    log: tuple[LogEntry, ...] = ()
    position: int = 0
    """The position from which the first event wait listens: the start of the run."""
    parent: ParentLink | None = None
    child_index: int | None = None
    child_key: str | None = None
    trigger: Trigger | None = None
    claim_key: str = ""
    """Routing key, on ``sublet.inboxes``, of claims for tickets of this shard."""
    shards: int = ids.BUCKETS
    """The number of shards, so that a worker can send reports about many leases to one shard in one body
    (`topology.run_key`)."""


class NoTask(Record, frozen=True, tag="no_task"):
    """No task is ready: the worker must acknowledge this ticket."""

    ticket: str


class OperationCompleted(Record, frozen=True, tag="operation_completed"):
    """An operation of a resident durable task ended."""

    lease: str
    operation_id: str
    done: Completion


class Revoked(Record, frozen=True, tag="revoked"):
    """This lease has ended: the worker must stop the code and report nothing."""

    lease: str
    reason: Literal["cancelled", "timed_out", "superseded"]


class Ping(Record, frozen=True, tag="ping"):
    """Asks a worker for a heartbeat; with ``hello`` also for a :class:`Hello`."""

    hello: bool = False


# --- to a client's inbox ---------------------------------------------------------------------------------------


class RunResult(Record, frozen=True, tag="run_result"):
    """The result of a run. ``status`` is None if the run does not exist. The output of a skipped task is
    ``{"skipped": true}``."""

    run_id: str
    status: RunStatus | None
    outputs: dict[str, msgspec.Raw] = {}
    errors: tuple[TaskError, ...] = ()
    cancelled_reason: str | None = None


class Query(Record, frozen=True, tag="query"):
    """A question to any scheduler; answered with :class:`Reply`. See ``sublet_scheduler.queries`` for the kinds."""

    correlation_id: str
    reply_to: str
    kind: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class Reply(Record, frozen=True, tag="reply"):
    """The answer to a query, cancel or replay: a value, or an error text."""

    correlation_id: str
    value: msgspec.Raw = NULL
    error: str | None = None


# --- to the timer ----------------------------------------------------------------------------------------------


class SetTimer(Record, frozen=True, tag="set_timer"):
    """Send :class:`TimerFired` at ``due`` (Unix seconds), or at once if that has passed. A timer with the same id does
    not change."""

    id: str
    due: float
    task_run_id: str
    operation_id: str
    """The wait key of the task: see `ids.wait_key`."""
    key: str


class CancelTimer(Record, frozen=True, tag="cancel_timer"):
    id: str


# --- to event-ingest -------------------------------------------------------------------------------------------


class Subscribe(Record, frozen=True, tag="subscribe"):
    """Send :class:`EventMatched` for the first matching event after the position ``since``. Event-ingest registers the
    subscription first and then looks back, so that no event is missed."""

    id: str
    task_run_id: str
    operation_id: str
    """The wait key of the task: see `ids.wait_key`."""
    condition: Condition
    since: int


class Unsubscribe(Record, frozen=True, tag="unsubscribe"):
    id: str


class RegisterTriggers(Record, frozen=True, tag="register_triggers"):
    """The events that start a run of this workflow (none if empty). Replaces the earlier registration."""

    workflow: str
    on_events: tuple[str, ...]
    filters: tuple[EventFilter, ...] = ()
    at: float = 0.0


# --- to consumers of sublet.notices (each message is one JSON object) -------------------------------------------


class TaskNotice(Record, frozen=True, tag="task_notice"):
    """A task was evicted, failed or was cancelled. The routing key is ``task.<status>.<workflow>.<task>``. The end of a
    run is a :class:`RunResult` with the routing key ``run.<status>.<workflow>``."""

    run_id: str
    task_run_id: str
    workflow: str
    task: str
    status: str
    at: float
    reason: str | None = None


# --- a ticket: its own AMQP message ----------------------------------------------------------------------------


class Ticket(Record, frozen=True, tag="ticket"):
    """A shard has a task that is ready.

    ``claim_key``: the routing key, on ``sublet.inboxes``, of the claim. ``shard_key``: the routing key of the shard's
    queue, on ``sublet.requests``, for a claim that got no answer.
    """

    id: str
    claim_key: str
    shard_key: str


ShardMessage = (
    RunRequest
    | WatchRun
    | CancelRun
    | ReplayRun
    | TimerFired
    | EventMatched
    | ChildFinished
    | Tick
    | Hello
    | Heartbeat
    | Goodbye
    | Claim
    | Finished
    | Failed
    | Evicted
    | Recorded
    | SlotReleased
    | TimeoutExtended
    | GrantDeclined
)
WorkerMessage = Grant | NoTask | OperationCompleted | Revoked | Ping | RunResult | Reply
ClientMessage = RunResult | Reply
TimerMessage = SetTimer | CancelTimer
IngestMessage = Subscribe | Unsubscribe | RegisterTriggers

_encoder = msgspec.json.Encoder()


def encode(messages: list[Record] | tuple[Record, ...]) -> bytes:
    """The body of one AMQP message."""
    return _encoder.encode(messages)


def encode_one(record: Record) -> bytes:
    return _encoder.encode(record)


class MalformedMessage(ValueError):
    """The body is not a valid message. The text gives the reason, for a person who inspects the dead letters."""


AnyMessage = TypeVar("AnyMessage")


def _decoder(type_: type[AnyMessage]) -> Callable[[bytes], AnyMessage]:
    decode_json = msgspec.json.Decoder(type_).decode

    def decode(body: bytes) -> AnyMessage:
        """Raises MalformedMessage, and nothing else."""
        try:
            return decode_json(body)
        except RecursionError:
            raise MalformedMessage("nested too deeply") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MalformedMessage(str(error)) from error

    return decode


decode_for_shard = _decoder(list[ShardMessage])
decode_for_worker = _decoder(list[WorkerMessage])
decode_for_client = _decoder(list[ClientMessage])
decode_for_timer = _decoder(list[TimerMessage])
decode_for_ingest = _decoder(list[IngestMessage])
decode_queries = _decoder(list[Query])
decode_ticket = _decoder(Ticket)
