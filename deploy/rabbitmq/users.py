"""Creates Sublet's RabbitMQ users with no more rights than each needs. Runs again without harm.

Speaks to the management API. Settings, all from the environment: RABBITMQ_API (the API's address),
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
    """A user and the names of what it may configure, write and read."""

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
    # Workers and SDK clients: their own queues, and the doors that are meant for them.
    User(
        name="sublet-worker",
        password_variable="RABBITMQ_WORKER_PASSWORD",
        configure=r"^sublet\.(pool|inbox)\..*",
        # Not pool queues: who may write there may bind them, and so put messages where tickets are expected.
        write=r"^sublet\.(inbox\..*|requests|workers|inboxes|events)$",
        read=r"^sublet\.((pool|inbox)\..*|inboxes|notices)$",
    ),
    # Whoever has only news to tell.
    User(
        name="sublet-publisher",
        password_variable="RABBITMQ_PUBLISHER_PASSWORD",
        configure=NOTHING,
        write=r"^sublet\.events$",
        read=NOTHING,
    ),
)


class ManagementApi:
    """The part of RabbitMQ's HTTP API that users and permissions need."""

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
    """Creates or updates the user and what it may do."""
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
            print(f"User {user.name} is there, with its permissions.", flush=True)
    except KeyError as missing:
        print(f"{missing.args[0]} is not set: run deploy/compose-env first.", file=sys.stderr)
        return 1
    except urllib.error.HTTPError as error:
        # The password of the administrator is taken from the environment at the broker's first start only.
        print(f"RabbitMQ refuses {error.url}: {error}. Is its volume older than .env?", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"RabbitMQ's management API does not answer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
