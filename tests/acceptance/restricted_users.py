"""A stack on which everybody has a user of the broker of their own, with the rights of `deploy/rabbitmq/users.py`."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

from deploy.rabbitmq.users import USERS

from acceptance.processes import Process
from acceptance.stack import Stack

SERVICE, WORKER, PUBLISHER = (user.name for user in USERS)


class GuardedStack(Stack):
    """Services and workers come as users of their own. ``guest`` is left for the test to look with."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._passwords = {user.name: secrets.token_hex() for user in USERS}

    def url(self, user: str) -> str:
        return f"amqp://{user}:{self._passwords[user]}@127.0.0.1:{self.rabbit.port}/"

    @property
    def variables(self) -> dict[str, str]:
        """That of workers and clients."""
        return {"SUBLET_AMQP_URL": self.url(WORKER)}

    def start_servers(self) -> None:
        super().start_servers()
        users = [{"name": name, "password": password, "tags": ""} for name, password in self._passwords.items()]
        permissions = [
            {"user": user.name, "vhost": "/", "configure": user.configure, "write": user.write, "read": user.read}
            for user in USERS
        ]
        definitions = self.directory / "users.json"
        definitions.write_text(json.dumps({"users": users, "permissions": permissions}))
        self.rabbit.ctl("import_definitions", str(definitions))

    def launch(self, service: str, variables: dict[str, str] | None = None) -> Process:
        addresses = {"SUBLET_AMQP_URL": self.url(SERVICE), "SUBLET_MONGO_URL": self.mongo.url}
        return super().launch(service, addresses | (variables or {}))


@contextlib.contextmanager
def guarded_stack(directory: Path) -> Iterator[GuardedStack]:
    """One that runs within the block."""
    stack = GuardedStack(directory)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
