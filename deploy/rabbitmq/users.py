"""Creates Sublet's RabbitMQ users, each with the rights that it needs and no more. It may be run repeatedly.

It uses the management API. All settings are environment variables: RABBITMQ_API (the address of the API),
RABBITMQ_ADMIN_USER and RABBITMQ_ADMIN_PASSWORD, a password for each user of the table below, and RABBITMQ_VHOST
(default: ``/``).
"""

import base64
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

NOTHING = "^$"


@dataclass(frozen=True)
class User:
    """A user, and patterns of the queues and exchanges that it may configure, write and read."""

    name: str
    password_variable: str
    configure: str
    write: str
    read: str


USERS = (
    User(
        name="sublet-service",
        password_variable="RABBITMQ_SERVICE_PASSWORD",
        configure=r"^sublet\..*",
        write=r"^(sublet\..*|amq\.default)$",
        read=r"^sublet\..*",
    ),
    # Workers and SDK clients: their own queues, and the exchanges that they publish to.
    User(
        name="sublet-worker",
        password_variable="RABBITMQ_WORKER_PASSWORD",
        configure=r"^sublet\.(pool|inbox)\..*",
        # Pool queues are excluded: with write permission a user could bind them, and then publish forged tickets.
        write=r"^sublet\.(inbox\..*|requests|workers|inboxes|events)$",
        read=r"^sublet\.((pool|inbox)\..*|inboxes|notices)$",
    ),
    # Programs that only publish events.
    User(
        name="sublet-publisher",
        password_variable="RABBITMQ_PUBLISHER_PASSWORD",
        configure=NOTHING,
        write=r"^sublet\.events$",
        read=NOTHING,
    ),
)


class ManagementApi:
    """The part of RabbitMQ's HTTP API that manages users and permissions."""

    def __init__(self, address: str, user: str, password: str) -> None:
        self._address = address.rstrip("/")
        self._authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def put(self, path: str, body: dict[str, str]) -> None:
        headers = {"Authorization": self._authorization, "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self._address}/api/{path}", data=json.dumps(body).encode(), headers=headers, method="PUT"
        )
        with urllib.request.urlopen(request, timeout=10):
            pass


def create(api: ManagementApi, user: User, password: str, vhost: str = "/") -> None:
    """Create or update the user and its permissions."""
    rights = {"configure": user.configure, "write": user.write, "read": user.read}
    api.put(f"users/{user.name}", {"password": password, "tags": ""})
    api.put(f"permissions/{urllib.parse.quote(vhost, safe='')}/{user.name}", rights)


def main() -> int:
    try:
        api = ManagementApi(
            os.environ["RABBITMQ_API"],
            os.environ["RABBITMQ_ADMIN_USER"],
            os.environ["RABBITMQ_ADMIN_PASSWORD"],
        )
        for user in USERS:
            create(api, user, os.environ[user.password_variable], os.environ.get("RABBITMQ_VHOST", "/"))
            print(f"User {user.name} exists with its permissions.", flush=True)
    except KeyError as missing:
        print(f"{missing.args[0]} is not set: run deploy/compose-env first.", file=sys.stderr)
        return 1
    except urllib.error.HTTPError as error:
        # RabbitMQ reads the administrator's password from the environment at its first start only.
        print(f"RabbitMQ refuses {error.url}: {error}. Is its volume older than .env?", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"RabbitMQ's management API does not answer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
