"""Refuses databases and virtual hosts that another version of Sublet has used in a format of its own.

A service that started nevertheless would misread documents, and messages would wait in queues that nobody consumes.
"""

from __future__ import annotations

from collections.abc import Mapping

from sublet_protocol.topology import FORMAT, FORMAT_MARKER, REQUESTS

FIRST_FINISH = "Before that, finish or cancel the runs with the version of Sublet that started them."


class IncompatibleFormat(Exception):
    """The database or the virtual host has another format. Waiting does not help; the text names the cure."""


def check_database(name: str, settings: Mapping[str, int | str]) -> None:
    """Check the stored settings of the database of this name.

    Raises:
        IncompatibleFormat: another format, or none, which is what Sublet 0.1.0 stored.
    """
    found = settings.get("format")
    if found != FORMAT:
        raise IncompatibleFormat(
            f"the database {name!r} {_described(found)}, but this version of Sublet reads format {FORMAT} only. "
            "Set SUBLET_MONGO_DATABASE to a new name, or drop this database if you need nothing in it. " + FIRST_FINISH
        )


def _described(found: int | str | None) -> str:
    if found is None:
        return "was created by an older version of Sublet (its settings have no format number)"
    return f"has format {found}"


def check_virtual_host(name: str, *, in_use: bool, marked: bool) -> None:
    """``in_use``: the exchange `REQUESTS` exists. ``marked``: so does `FORMAT_MARKER`, looked up after the other one.

    Every service declares the marker before all else. So an exchange without a marker is not ours, also when many
    services start at once.

    Raises:
        IncompatibleFormat: the virtual host is in use, but not marked.
    """
    if in_use and not marked:
        raise IncompatibleFormat(
            f"the RabbitMQ virtual host {name!r} was set up by another version of Sublet (it has the exchange "
            f"{REQUESTS!r}, but not the exchange {FORMAT_MARKER!r}). Use another virtual host in SUBLET_AMQP_URL, "
            "or delete all queues and exchanges whose names begin with 'sublet.' in this one. " + FIRST_FINISH
        )
