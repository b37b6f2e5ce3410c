"""Loads the worker that the command line names as ``module:attr``."""

from __future__ import annotations

import importlib
import os
import sys

from sublet._worker.worker import Worker


class BadApp(Exception):
    """The path names no worker. The text has what it names instead."""


def load_worker(app_path: str) -> Worker:
    """The worker ``module:attr``, or the result of the function of that name. The current directory is searched first.

    Raises:
        BadApp: the path names no worker. Exceptions of the module itself are not caught.
    """
    module_name, colon, path = app_path.partition(":")
    if not module_name or not colon or not path:
        raise BadApp(f"{app_path!r} is not of the form module:attr, such as shop.tasks:worker")
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
        raise BadApp(f"{app_path!r} is neither a sublet.Worker nor a function that returns one, but {found!r}")
    return found
