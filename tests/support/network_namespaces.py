"""Three network namespaces on this machine. Clients reach all of them. The links between them can be cut. No packet
leaves the machine."""

from __future__ import annotations

import os
import random
import subprocess
from contextlib import suppress

from deploy.localstack.rabbit import Node

SIZE = 3
DETECTED_WITHIN_S = 8
"""Erlang considers a node down after about this time of silence. Its default is a minute."""


class Networks:
    """The network namespaces. ``nodes``: the configurations of the brokers in them."""

    def __init__(self) -> None:
        self._name = f"sublet-{os.getpid()}-{random.randrange(1_000)}"
        self._switch = f"{self._name}-switch"
        # Reserved addresses: those between the nodes are for documentation, those of the clients for benchmarks.
        self._clients = f"198.18.{random.randrange(256)}"
        self.nodes = [
            Node(
                name=f"sublet-{place}",
                address=f"198.51.100.{place + 1}",
                client_address=f"{self._clients}.{4 * place + 2}",
                enter=("ip", "netns", "exec", self._space(place)),
                settings="loopback_users.guest = false\n",
                erlang_arguments=f"-kernel net_ticktime {DETECTED_WITHIN_S}",
            )
            for place in range(SIZE)
        ]

    def make(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "between", "type", "bridge")
        ip("-n", self._switch, "link", "set", "between", "up")
        for place, node in enumerate(self.nodes):
            self._make(place, node)

    def remove(self) -> None:
        for space in (*map(self._space, range(SIZE)), self._switch):
            with suppress(subprocess.CalledProcessError):  # not made yet
                ip("netns", "delete", space)

    def cut(self, place: int) -> None:
        """Cut the link of one node to the others, silently in both directions."""
        ip("-n", self._switch, "link", "set", f"port{place}", "down")

    def mend(self, place: int) -> None:
        ip("-n", self._switch, "link", "set", f"port{place}", "up")

    def _make(self, place: int, node: Node) -> None:
        space, outside = self._space(place), f"sl{os.getpid()}-{place}"
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
        plug = f"port{place}"
        ip("link", "add", "others", "netns", space, "type", "veth", "peer", "name", plug, "netns", self._switch)
        ip("-n", space, "address", "add", f"{node.address}/24", "dev", "others")
        ip("-n", space, "link", "set", "others", "up")
        ip("-n", self._switch, "link", "set", plug, "master", "between", "up")
        ip("link", "add", outside, "type", "veth", "peer", "name", "clients", "netns", space)
        ip("address", "add", f"{self._clients}.{4 * place + 1}/30", "dev", outside)
        ip("link", "set", outside, "up")
        ip("-n", space, "address", "add", f"{node.client_address}/30", "dev", "clients")
        ip("-n", space, "link", "set", "clients", "up")

    def _space(self, place: int) -> str:
        return f"{self._name}-{place}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def may_be_made() -> bool:
    """True if this machine has the program ip and permits network namespaces."""
    trial = f"sublet-{os.getpid()}-trial"
    try:
        ip("netns", "add", trial)
        ip("-n", trial, "link", "add", "here", "type", "veth", "peer", "name", "there")
        ip("-n", trial, "link", "add", "between", "type", "bridge")
    except (OSError, subprocess.CalledProcessError):
        return False
    else:
        return True
    finally:
        with suppress(OSError, subprocess.CalledProcessError):
            ip("netns", "delete", trial)
