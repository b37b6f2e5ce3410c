"""Runs as documents: BSON for fields that are queried or updated, JSON text for values of users."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from sublet_engine.run.state import Run
from sublet_engine.shard.counters import waiting_reason
from sublet_platform.mongo.client import Update
from sublet_protocol import ids

TAG_MAX_CHARS = 256
"""Longer metadata entries are indexed by their digest, because an index entry costs memory in the server."""

_CHANGING = tuple(field.name for field in msgspec.structs.fields(Run) if field.name not in ("id", "tasks"))


def metadata_tags(metadata: Mapping[str, object]) -> list[str]:
    """The index entries of the metadata: ``<key>=<value as JSON>`` for each entry."""
    return [_tag(key, value) for key, value in metadata.items()]


def _tag(key: str, value: object) -> str:
    tag = f"{key}={msgspec.json.encode(value, order='deterministic').decode()}"
    return tag if len(tag) <= TAG_MAX_CHARS else hashlib.sha256(tag.encode()).hexdigest()


def waiting_reasons(run: Run) -> list[str]:
    """One reason for each waiting task. The next owner of the shard counts them."""
    return [reason for task in run.tasks if (reason := waiting_reason(task)) is not None]


def json_text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def document_of(run: Run) -> dict[str, Any]:
    """The document of a run. Fields with their default value are omitted, except those that are queried."""
    document: dict[str, Any] = msgspec.to_builtins(run)
    document["_id"] = document.pop("id")
    document["bucket"] = ids.bucket_of(run.id)
    document["live"] = run.live
    if waiting := waiting_reasons(run):
        document["waiting"] = waiting
    document["status"] = run.status
    document["revision"] = run.revision
    if run.metadata:
        document["metadata"] = json_text(run.metadata)
        document["tags"] = metadata_tags(run.metadata)
    if run.trigger is not None:
        document["trigger"] = _stored_field(run, "trigger")
    if run.outbox:
        document["outbox"] = _stored_field(run, "outbox")
    return document


def update_of(before: Run, after: Run) -> Update:
    """The update that turns the document of ``before`` into that of ``after``."""
    changes: dict[str, Any] = {}
    for name in _CHANGING:
        if getattr(before, name) is not getattr(after, name):
            changes[name] = _stored_field(after, name)
    if "metadata" in changes:
        changes["tags"] = metadata_tags(after.metadata)
    waiting = waiting_reasons(after)
    if waiting_reasons(before) != waiting:
        changes["waiting"] = waiting
    if before.live != after.live:
        changes["live"] = after.live
    if before.tasks is after.tasks:
        return Update(after.id, before.revision, changes)
    if len(before.tasks) != len(after.tasks) or len(after.tasks) == 1:
        changes["tasks"] = msgspec.to_builtins(after.tasks)
        return Update(after.id, before.revision, changes)
    tasks = {
        index: msgspec.to_builtins(new)
        for index, (old, new) in enumerate(zip(before.tasks, after.tasks, strict=True))
        if old is not new
    }
    return Update(after.id, before.revision, changes, {"tasks": tasks} if tasks else {})


def _stored_field(run: Run, name: str) -> Any:
    value = getattr(run, name)
    if name == "metadata":
        return json_text(value)
    if name == "outbox":
        return [{"to": msgspec.to_builtins(message.to), "body": message.body.decode()} for message in run.outbox]
    stored = msgspec.to_builtins(value)
    if name == "trigger" and stored is not None and "filter_payload" in stored:
        stored["filter_payload"] = json_text(value.filter_payload)
    return stored


def run_of(document: dict[str, Any]) -> Run:
    """The run of a document that `document_of` or `update_of` has written. The document is modified."""
    document["id"] = document.pop("_id")
    if "metadata" in document:
        document["metadata"] = msgspec.json.decode(document["metadata"])
    trigger = document.get("trigger")
    if trigger is not None and "filter_payload" in trigger:
        trigger["filter_payload"] = msgspec.json.decode(trigger["filter_payload"])
    for message in document.get("outbox", ()):
        message["body"] = message["body"].encode()
    return msgspec.convert(document, Run)
