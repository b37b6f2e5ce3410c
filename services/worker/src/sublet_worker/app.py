"""Which worker to run: ``module:attr`` as people write it on the command line."""

from __future__ import annotations

import importlib
import os
import sys

from sublet._worker.worker import Worker


class BadApp(Exception):
    """There is no worker at this place; the text says what is there instead."""


def load_worker(place: str) -> Worker:
    """The worker at ``module:attr``, or what the callable there returns. The current directory is searched first.

    Raises:
        BadApp: the place names no worker. What the module itself raises comes through as it is.
    """
    module_name, colon, path = place.partition(":")
    if not module_name or not colon or not path:
        raise BadApp(f"{place!r} is not of the form module:attr, such as shop.tasks:worker")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise BadApp(f"there is no module {module_name!r} in {os.getcwd()} or among the installed packages") from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise BadApp(f"module {module_name!r} has no {path!r}") from error
    if callable(found):
        found = found()
    if not isinstance(found, Worker):
        raise BadApp(f"{place!r} is neither a sublet.Worker nor a function that returns one, but {found!r}")
    return found
