"""Everything that travels between clients, workers and services.

A message body between our own processes is a JSON array of the records below, each with its tag in ``t``;
one AMQP message may so carry many. User payloads travel as raw JSON (`msgspec.Raw`): nobody between the two
ends decodes them. (Tickets are the exception: one AMQP message each, because a delivery *is* a slot.)

=====================  ==========================================================  =============================
exchange               routing key                                                 who listens
=====================  ==========================================================  =============================
``sublet.requests``    ``shard_key.00`` … ``shard_key.63`` (:func:`ids.bucket_key`)            the shard's scheduler
``sublet.requests``    ``query``                                                   any scheduler
``sublet.workers``     (fanout)                                                    every shard's scheduler
``sublet.inboxes``     an inbox's name                                             one worker, client, scheduler
``sublet.events``      event key (public: plain JSON object, see README)           event-ingest
``sublet.notices``     ``run.completed.<workflow>`` …                              whoever likes
(default)              ``sublet.pool.<pool>.<kind>``: tickets                      the workers of the pool
(default)              ``sublet.timers``, ``sublet.ingest``                        timer, event-ingest
=====================  ==========================================================  =============================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from sublet_protocol import ids
from sublet_protocol.specs import Condition, EventFilter, Groups, SlotKind, WorkflowSpec

RunStatus = Literal["QUEUED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"]
TERMINAL_RUN = ("COMPLETED", "FAILED", "CANCELLED")

NULL = msgspec.Raw(b"null")
"""The JSON of a value that is not there. (None could not say it: msgspec has no raw JSON inside a union.)"""


def raw_json(text: str | None) -> msgspec.Raw:
    """JSON text as it travels."""
    return NULL if text is None else msgspec.Raw(text)


def json_text(raw: msgspec.Raw) -> str | None:
    """JSON as it is stored: text, and None for ``null``."""
    return None if raw == NULL else str(raw, "utf-8")


def json_bytes(raw: msgspec.Raw) -> bytes | None:
    """JSON for a decoder; None for ``null``."""
    return None if raw == NULL else bytes(raw)


class Record(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="t"):
    """Base of all messages: immutable, with defaults left out on the wire.

    Each kind pins its tag, so that a renamed class still reads what is stored or under way.
    """


class TaskError(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a task failed: the exception's class name, its text, and the trace as text."""

    type: str
    message: str
    trace: str = ""
    task_run_id: str = ""


class ParentLink(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who waits for a child: the parent's task run and the node of its log ("" for an ordinary task)."""

    task_run_id: str
    operation_id: str = ""


class Trigger(msgspec.Struct, frozen=True, omit_defaults=True):
    """The event that started a run, and the payload of the filter that let it through."""

    event_id: str
    event_key: str
    filter_payload: dict[str, object] = {}


# --- to a shard: about runs -----------------------------------------------------------------------------------


class RunRequest(Record, frozen=True, tag="run_request"):
    """Create this run, unless it is there; then only add the watcher and the parent."""

    run_id: str
    workflow: str
    input: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: dict[str, object] = {}
    priority: int | None = None
    reply_to: str | None = None
    """Inbox that gets the :class:`RunResult`."""
    parent: ParentLink | None = None
    notify_parent: bool = True
    child_index: int | None = None
    child_key: str | None = None
    trigger: Trigger | None = None
    requested_at: float = 0.0


class WatchRun(Record, frozen=True, tag="watch_run"):
    """Send the result of this run to the inbox when it ends, or now if it has. Unknown run: status ``None``."""

    run_id: str
    reply_to: str


class CancelRun(Record, frozen=True, tag="cancel_run"):
    """Cancel a run, or one task of it when ``task_run_id`` is given. Terminal things do not change."""

    run_id: str
    task_run_id: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None


class ReplayRun(Record, frozen=True, tag="replay_run"):
    """Run a finished run again: what failed or was cancelled and everything after it; all of it if it completed."""

    run_id: str
    reply_to: str | None = None
    correlation_id: str | None = None


class TimerFired(Record, frozen=True, tag="timer_fired"):
    """A timer came due. ``task_run_id``, ``operation_id`` and ``key`` say whose; see :class:`SetTimer`."""

    task_run_id: str
    operation_id: str
    key: str


class EventMatched(Record, frozen=True, tag="event_matched"):
    """An event satisfies a condition. ``seq`` is the event's place in the order of all events."""

    task_run_id: str
    operation_id: str
    key: str
    event_id: str
    seq: int
    payload: msgspec.Raw


class ChildFinished(Record, frozen=True, tag="child_finished"):
    """A child that somebody waits for has ended. ``output`` as the parent sees it: bare for a one-task workflow."""

    task_run_id: str
    operation_id: str
    child_run_id: str
    status: RunStatus
    output: msgspec.Raw = NULL
    error: TaskError | None = None
    at: float | None = None
    """When it ended (epoch seconds)."""


class Tick(Record, frozen=True, tag="tick"):
    """From the timer, each second: time passes."""

    at: float


# --- to every shard: workers ----------------------------------------------------------------------------------


class HeldLease(msgspec.Struct, frozen=True, omit_defaults=True):
    """A lease as its worker sees it.

    ``delivered``: the highest order up to which a resident durable task has received every result (given to the
    code or not); -1 for a lease whose results do not matter (not durable, or not started).
    """

    lease: str
    delivered: int = -1


class Hello(Record, frozen=True, tag="hello"):
    """A worker process started (or a scheduler asked): what it can run. Sent before its first claim."""

    worker: str
    pool: str
    name: str
    inbox: str
    slots: int
    durable_slots: int
    workflows: tuple[WorkflowSpec, ...]
    at: float = 0.0
    """When the process started: later ones make their workflows the current versions."""
    labels: dict[str, str | int] = {}

    @property
    def actions(self) -> list[str]:
        """What its pool can run: ``<workflow>:<task>``."""
        return [f"{spec.name}:{task.name}" for spec in self.workflows for task in spec.tasks]


class Heartbeat(Record, frozen=True, tag="heartbeat"):
    """A worker lives and holds these leases. Sent every `limits.HEARTBEAT_INTERVAL_S`, on reconnect and when asked."""

    worker: str
    pool: str
    inbox: str
    slots: int
    durable_slots: int
    leases: tuple[HeldLease, ...] = ()
    draining: bool = False
    taken: int = 0
    durable_taken: int = 0
    """Of its slots, by tasks of whatever shard."""


class Goodbye(Record, frozen=True, tag="goodbye"):
    """A worker left in good order: it holds nothing any more."""

    worker: str


# --- to a shard: under a ticket or a lease ---------------------------------------------------------------------


class Claim(Record, frozen=True, tag="claim"):
    """A worker holds this ticket and has room. Answered with :class:`Grant` or :class:`NoTask`."""

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
    """A new entry of the durable log: what the code asked for, at which node.

    ``operation_id`` is the place in the code's task tree: ``"3"`` is the third operation of the function itself,
    ``"t1.2"`` the second of the second asyncio task that it started, ``"t1.t0.1"`` one level deeper.
    ``fingerprint`` is a digest of what was asked; ``asked`` says the same for a person.
    """

    operation_id: str
    kind: Literal["wait", "run", "memo"]
    fingerprint: str
    asked: str
    label: str | None = None
    groups: Groups = ()
    """kind wait: what must come true (a sleep is one group of one condition)."""
    since: int = 0
    """kind wait: events after this place in the order of events count (see :attr:`LogEntry.position`)."""
    child: ChildRequest | None = None
    result: msgspec.Raw = NULL
    """kind memo: the value."""


class Finished(Record, frozen=True, tag="finished"):
    """The task returned. ``output`` is raw JSON."""

    lease: str
    ticket: str | None
    output: msgspec.Raw = NULL
    next: bool = False
    """Asks for the next task under the same ticket."""


class Failed(Record, frozen=True, tag="failed"):
    lease: str
    ticket: str | None
    error: TaskError
    retryable: bool = True
    next: bool = False


class Evicted(Record, frozen=True, tag="evicted"):
    """The checkpoint of a durable task whose every branch waits; the coroutine is dropped, the lease ends.

    ``blocked``: each branch's nodes, all of which it needs. ``delivered``: the highest order the code has seen.
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
    """New operations of a durable task that stays resident (it still works, or its policy keeps it)."""

    lease: str
    operations: tuple[Operation, ...]
    waiting: bool = False
    """Every branch waits, so the execution clock stands still."""
    active_s: float = 0.0
    number: int = 0
    """Counts the Recorded and Extended reports of this lease, from 1: one that comes twice changes nothing."""


class SlotReleased(Record, frozen=True, tag="slot_released"):
    """``release_slot()``: the ticket is about to be acknowledged, the lease goes on."""

    lease: str


class TimeoutExtended(Record, frozen=True, tag="timeout_extended"):
    """``refresh_timeout()``: add this to the execution timeout of the lease."""

    lease: str
    by_s: float
    number: int = 0
    """As in :class:`Recorded`."""


class GrantDeclined(Record, frozen=True, tag="grant_declined"):
    """A grant that the worker did not start (it is leaving): ready again, nothing counted."""

    lease: str
    ticket: str | None


# --- to a worker's inbox ---------------------------------------------------------------------------------------


class Completion(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an operation ended. ``order`` is the place among the task's satisfied operations, from 1, gap-free."""

    order: int
    result: msgspec.Raw = NULL
    error: TaskError | None = None
    position: int = 0
    """Where a following event wait starts to listen: microseconds since 1970, or the seq of the matched event."""


class LogEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One operation of the durable log as a grant carries it. ``done`` is None while it is open.

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
    """The right to run one invocation, and all that it needs."""

    ticket: str
    lease: str
    workflow: str
    version: str
    task: str
    input: msgspec.Raw
    retry_count: int
    invocation: int
    timeout_s: float
    """Active time left."""
    metadata: dict[str, object] = {}
    priority: int = 1
    parents: dict[str, msgspec.Raw] = {}
    """Outputs of the task's parents; None for one without output."""
    skipped: tuple[str, ...] = ()
    errors: dict[str, TaskError] = {}
    """For an on-failure task: the errors of the tasks that failed."""
    log: tuple[LogEntry, ...] = ()
    position: int = 0
    """Where an event wait listens from that no operation precedes: the run's start."""
    parent: ParentLink | None = None
    child_index: int | None = None
    child_key: str | None = None
    trigger: Trigger | None = None
    claim_key: str = ""
    """Routing key, on ``sublet.inboxes``, of claims for tickets of this shard."""
    shards: int = ids.BUCKETS
    """The number of shards: reports of many leases to one shard travel together (`ids.bucket_key`)."""


class NoTask(Record, frozen=True, tag="no_task"):
    """Acknowledge this ticket."""

    ticket: str


class OperationCompleted(Record, frozen=True, tag="operation_completed"):
    """An operation of a resident durable task ended."""

    lease: str
    operation_id: str
    done: Completion


class Revoked(Record, frozen=True, tag="revoked"):
    """This lease has ended: stop the code, report nothing. ``reason`` is for ``ctx`` and the log."""

    lease: str
    reason: Literal["cancelled", "timed_out", "superseded"]


class Ping(Record, frozen=True, tag="ping"):
    """Send a heartbeat now; with ``hello`` also a :class:`Hello`."""

    hello: bool = False


# --- to a client's inbox ---------------------------------------------------------------------------------------


class RunResult(Record, frozen=True, tag="run_result"):
    """How a run ended. ``status`` None: there is no such run. ``outputs``: skipped tasks give ``{"skipped": true}``."""

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
    """Send :class:`TimerFired` at ``due`` (epoch seconds), or at once if that has passed. Same id: no change."""

    id: str
    due: float
    task_run_id: str
    operation_id: str
    """The place where the task waits: see :func:`ids.wait_key`."""
    key: str


class CancelTimer(Record, frozen=True, tag="cancel_timer"):
    id: str


# --- to event-ingest -------------------------------------------------------------------------------------------


class Subscribe(Record, frozen=True, tag="subscribe"):
    """Send :class:`EventMatched` for the first event after ``since`` that fits. Register, then look back."""

    id: str
    task_run_id: str
    operation_id: str
    """The place where the task waits: see :func:`ids.wait_key`."""
    condition: Condition
    since: int


class Unsubscribe(Record, frozen=True, tag="unsubscribe"):
    id: str


class RegisterTriggers(Record, frozen=True, tag="register_triggers"):
    """What starts a run of this workflow; replaces what was registered before. Empty: nothing does."""

    workflow: str
    on_events: tuple[str, ...]
    filters: tuple[EventFilter, ...] = ()
    at: float = 0.0


# --- to whoever watches sublet.notices (one plain JSON object a message) ----------------------------------------


class TaskNotice(Record, frozen=True, tag="task_notice"):
    """A task changed state in a way that people care about. Routing key ``task.<status>.<workflow>.<task>``; the end
    of a run comes as a :class:`RunResult` with the routing key ``run.<status>.<workflow>``."""

    run_id: str
    task_run_id: str
    workflow: str
    task: str
    status: str
    at: float
    reason: str | None = None


# --- a ticket: its own AMQP message ----------------------------------------------------------------------------


class Ticket(Record, frozen=True, tag="ticket"):
    """A shard has something to run.

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
    """A body that is none of ours. The text says why, for the person who finds it among the dead letters."""


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
