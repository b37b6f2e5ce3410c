"""MongoDB: the connection and a few bulk operations. This is the only module that imports the driver.

Writes are journaled by a majority, reads go to the primary. Every method raises `StoreUnavailable` if the server cannot
be reached or does not answer in time. Other errors (a document that is too large, a value that BSON cannot encode)
belong to one write, and are the exceptions of the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bson.int64 import Int64
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import DeleteMany, InsertOne, ReadPreference, ReplaceOne, UpdateOne, WriteConcern
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    ExecutionTimeout,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    WTimeoutError,
)

from sublet_platform.ports import StoreUnavailable

Document = dict[str, Any]
T = TypeVar("T")

SERVER_SELECTION_TIMEOUT_MS = 3_000
"""How long one operation waits for a primary: longer than an election takes."""
SOCKET_TIMEOUT_MS = 10_000
"""How long one operation waits for an answer; a batch of a thousand documents takes less than a second."""
WRITE_TIMEOUT_MS = 10_000
"""How long the primary waits for a majority."""

_ARRAY_MAX = 2**31 - 1
_DUPLICATE_KEY = 11_000
_ALREADY_INITIALIZED = 23
_TRANSIENT_LABELS = ("RetryableWriteError", "TransientTransactionError")
_TRANSIENT_CODES = frozenset(
    (
        6,  # HostUnreachable
        7,  # HostNotFound
        50,  # MaxTimeMSExpired
        64,  # WriteConcernFailed
        89,  # NetworkTimeout
        91,  # ShutdownInProgress
        100,  # UnsatisfiableWriteConcern
        189,  # PrimarySteppedDown
        262,  # ExceededTimeLimit
        9001,  # SocketException
        10107,  # NotWritablePrimary
        11600,  # InterruptedAtShutdown
        11602,  # InterruptedDueToReplStateChange
        13435,  # NotPrimaryNoSecondaryOk
        13436,  # NotPrimaryOrSecondary
    )
)


@dataclass(frozen=True, slots=True)
class Update:
    """Changes to one document, conditional on its revision.

    ``changes``: fields to set, with the new revision. ``elements``: changed array elements by field and index.
    """

    key: str
    revision: int
    changes: Mapping[str, Any]
    elements: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a bulk write: the number of successful updates, and the inserts whose id existed already."""

    updated: int = 0
    duplicates: frozenset[int] = frozenset()
    """Indexes in the list of inserts."""


@dataclass(frozen=True, slots=True)
class Index:
    """An index to create. ``keys``: (field, 1 or -1). ``only``: partial filter. ``expires``: TTL on a date field."""

    keys: Sequence[tuple[str, int]]
    only: Mapping[str, Any] | None = None
    sparse: bool = False
    expires: bool = False


def _transient(error: PyMongoError) -> bool:
    if isinstance(error, BulkWriteError):
        return _transient_bulk(error)
    if isinstance(error, ConnectionFailure | ExecutionTimeout | WTimeoutError) or error.timeout:
        return True
    if any(error.has_error_label(label) for label in _TRANSIENT_LABELS):
        return True
    return isinstance(error, OperationFailure) and error.code in _TRANSIENT_CODES


def _transient_bulk(error: BulkWriteError) -> bool:
    details: Mapping[str, Any] = error.details or {}
    if details.get("writeConcernErrors"):
        return True
    return any(each.get("code") in _TRANSIENT_CODES for each in details.get("writeErrors", ()))


class Mongo:
    """One database. ``on_seconds(operation, seconds)`` receives the duration of each round trip."""

    def __init__(
        self,
        client: AsyncIOMotorClient[Document],
        database: str,
        on_seconds: Callable[[str, float], None] | None = None,
    ) -> None:
        self._client = client
        concern = WriteConcern(w="majority", j=True, wtimeout=WRITE_TIMEOUT_MS)
        # Decisions depend on reads, so they go to the primary, also if the URL has another preference.
        self._database = client.get_database(database, write_concern=concern, read_preference=ReadPreference.PRIMARY)
        self._on_seconds = on_seconds

    async def _ask(self, operation: str, call: Awaitable[T]) -> T:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await call
        except PyMongoError as error:
            if _transient(error):
                raise StoreUnavailable(f"{operation}: {error}") from error
            raise
        finally:
            if self._on_seconds is not None:
                self._on_seconds(operation, loop.time() - began)

    # --- reading ------------------------------------------------------------------------------------------

    async def find(
        self,
        collection: str,
        where: Mapping[str, Any],
        *,
        sort: Sequence[tuple[str, int]] = (),
        limit: int = 0,
        skip: int = 0,
        only: Sequence[str] = (),
    ) -> list[Document]:
        """``only``: return these fields and the id."""
        fields = list(only) or None
        cursor = self._database[collection].find(where, fields, sort=list(sort) or None, limit=limit, skip=skip)
        documents: list[Document] = _plain(await self._ask("find", cursor.to_list(None)))
        return documents

    async def find_one(
        self, collection: str, where: Mapping[str, Any], *, sort: Sequence[tuple[str, int]] = ()
    ) -> Document | None:
        call = self._database[collection].find_one(where, sort=list(sort) or None)
        document: Document | None = _plain(await self._ask("find", call))
        return document

    async def find_in_chunks(
        self, collection: str, where: Mapping[str, Any], *, sort: Sequence[tuple[str, int]], chunk: int
    ) -> AsyncIterator[list[Document]]:
        cursor = self._database[collection].find(where, sort=list(sort), batch_size=chunk)
        while documents := await self._ask("find", cursor.to_list(chunk)):
            yield _plain(documents)

    async def count_each(self, collection: str, where: Mapping[str, Any], name: str) -> dict[str, int]:
        """The number of occurrences of each value in the arrays of this name."""
        stages: list[Mapping[str, Any]] = [
            {"$match": where},
            {"$unwind": f"${name}"},
            {"$group": {"_id": f"${name}", "count": {"$sum": 1}}},
        ]
        documents = await self._ask("count", self._database[collection].aggregate(stages).to_list(None))
        return {each["_id"]: each["count"] for each in documents}

    async def count(self, collection: str) -> int:
        """An estimate of the number of documents, from metadata."""
        return await self._ask("count", self._database[collection].estimated_document_count())

    # --- writing ------------------------------------------------------------------------------------------

    async def write(
        self,
        collection: str,
        *,
        inserts: Sequence[Document] = (),
        updates: Sequence[Update] = (),
        deletes: Sequence[str] = (),
    ) -> Written:
        """One unordered bulk write. An insert whose id exists is skipped and reported."""
        operations: list[Any] = [InsertOne(document) for document in inserts]
        operations += [_conditional(update) for update in updates]
        if deletes:
            operations.append(DeleteMany({"_id": {"$in": list(deletes)}}))
        if not operations:
            return Written()
        try:
            result = await self._ask("write", self._bulk(collection, operations))
        except BulkWriteError as error:
            return self._duplicates_of(error, len(inserts))
        return Written(result.modified_count)

    @staticmethod
    def _duplicates_of(error: BulkWriteError, inserts: int) -> Written:
        details: Mapping[str, Any] = error.details or {}
        errors = details["writeErrors"]
        if any(each["code"] != _DUPLICATE_KEY or each["index"] >= inserts for each in errors):
            raise error
        return Written(details["nModified"], frozenset(each["index"] for each in errors))

    async def replace(self, collection: str, documents: Sequence[Document], deletes: Sequence[str] = ()) -> None:
        """Replace or insert these documents, and delete others."""
        operations: list[Any] = [ReplaceOne({"_id": each["_id"]}, each, upsert=True) for each in documents]
        if deletes:
            operations.append(DeleteMany({"_id": {"$in": list(deletes)}}))
        if operations:
            await self._ask("write", self._bulk(collection, operations))

    def _bulk(self, collection: str, operations: list[Any]) -> Awaitable[Any]:
        return self._database[collection].bulk_write(operations, ordered=False)

    async def replace_unless(self, collection: str, document: Document, unless: Mapping[str, Any]) -> None:
        """Replace or insert the document, unless the existing one matches ``unless``."""
        where = {"_id": document["_id"], "$nor": [unless]}
        try:
            await self._ask("write", self._database[collection].replace_one(where, document, upsert=True))
        except DuplicateKeyError:
            return  # the existing document matches

    async def add_to_sets(self, collection: str, name: str, values: Mapping[str, Sequence[Any]]) -> None:
        """Add values to the array ``name`` of the documents with these ids, each value once."""
        operations: list[Any] = [
            UpdateOne({"_id": key}, {"$addToSet": {name: {"$each": list(added)}}}, upsert=True)
            for key, added in values.items()
        ]
        if operations:
            await self._ask("write", self._bulk(collection, operations))

    async def raise_to(self, collection: str, key: str, name: str, value: int) -> None:
        """Set a number of a document, unless the stored one is greater."""
        call = self._database[collection].update_one({"_id": key}, {"$max": {name: value}}, upsert=True)
        await self._ask("write", call)

    async def set_once(self, collection: str, key: str, values: Mapping[str, Any]) -> Document:
        """Insert a document unless it exists. Returns the stored one."""
        call = self._database[collection].find_one_and_update(
            {"_id": key}, {"$setOnInsert": dict(values)}, upsert=True, return_document=True
        )
        document: Document = _plain(await self._ask("write", call))
        return document

    # --- the server ---------------------------------------------------------------------------------------

    async def ensure_indexes(self, indexes: Mapping[str, Sequence[Index]]) -> None:
        """Create the indexes of each collection. An existing index stays unchanged."""
        for collection, wanted in indexes.items():
            for index in wanted:
                options: Document = {}
                if index.only is not None:
                    options["partialFilterExpression"] = dict(index.only)
                if index.sparse:
                    options["sparse"] = True
                if index.expires:
                    options["expireAfterSeconds"] = 0
                await self._ask("index", self._database[collection].create_index(list(index.keys), **options))

    async def ping(self) -> None:
        await self._ask("ping", self._client.admin.command("ping"))

    async def drop_database(self) -> None:
        await self._ask("drop", self._client.drop_database(self._database.name))

    def close(self) -> None:
        self._client.close()

    async def hello(self) -> Document:
        """The server's answer to ``hello``: ``isWritablePrimary``, ``setName``, ``me`` …"""
        answer: Document = await self._ask("hello", self._client.admin.command("hello"))
        return answer

    async def server_status(self) -> Document:
        """The counters of the server: operations, documents, bytes."""
        status: Document = _plain(await self._ask("status", self._client.admin.command("serverStatus")))
        return status

    async def initiate_replica_set(self, name: str, members: Sequence[str]) -> bool:
        """Initiate the replica set. False if that has been done before."""
        config = {"_id": name, "members": [{"_id": index, "host": member} for index, member in enumerate(members)]}
        try:
            await self._ask("initiate", self._client.admin.command("replSetInitiate", config))
        except OperationFailure as error:
            if error.code == _ALREADY_INITIALIZED:
                return False
            raise
        return True


def _conditional(update: Update) -> UpdateOne:
    """The condition is part of the update, not of the query. A query by id alone needs no query plan, which would cost
    the server more than the update itself."""
    new: list[Any] = ["$$ROOT", {"$literal": update.changes}]
    if update.elements:
        new.append({name: _spliced(name, elements) for name, elements in update.elements.items()})
    unchanged = {"$eq": ["$revision", update.revision]}
    return UpdateOne({"_id": update.key}, [{"$replaceWith": {"$cond": [unchanged, {"$mergeObjects": new}, "$$ROOT"]}}])


def _spliced(name: str, elements: Mapping[int, Any]) -> Document:
    """The array of this name with other elements at some indexes."""
    parts: list[Any] = []
    start = 0
    for index in sorted(elements):
        if index > start:
            parts.append({"$slice": [f"${name}", start, index - start]})
        parts.append([{"$literal": elements[index]}])
        start = index + 1
    parts.append({"$slice": [f"${name}", start, _ARRAY_MAX]})
    return {"$concatArrays": parts}


def _plain(value: Any) -> Any:
    """Convert large integers, for which the driver has a class of its own, to int."""
    if type(value) is dict:
        return {key: _plain(each) for key, each in value.items()}
    if type(value) is list:
        return [_plain(each) for each in value]
    return int(value) if type(value) is Int64 else value


def connect(
    url: str,
    database: str,
    *,
    on_seconds: Callable[[str, float], None] | None = None,
    direct: bool | None = None,
) -> Mongo:
    """Connect in the background; the first operation waits for the server. Call it in a running event loop.

    Raises:
        ValueError: the URL is not a MongoDB URL.
    """
    options: dict[str, Any] = {} if direct is None else {"directConnection": direct}
    try:
        client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(
            url,
            serverSelectionTimeoutMS=SERVER_SELECTION_TIMEOUT_MS,
            connectTimeoutMS=SERVER_SELECTION_TIMEOUT_MS,
            socketTimeoutMS=SOCKET_TIMEOUT_MS,
            # Callers retry themselves, from the stored state. The retries of the driver cost another write for each
            # document, in which the server stores that it has been written.
            retryWrites=False,
            retryReads=True,
            **options,
        )
    except (InvalidURI, ConfigurationError) as error:
        raise ValueError(f"not a MongoDB URL: {error}") from error
    return Mongo(client, database, on_seconds)
