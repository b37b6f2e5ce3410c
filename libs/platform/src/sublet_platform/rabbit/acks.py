"""Tracks the settled delivery tags of a channel, and finds the fewest frames that settle more of them.

A tag may be settled only once: RabbitMQ closes the channel at a second time, and redelivers all unsettled messages.
``multiple`` settles everything up to a tag, so it is only used for a contiguous prefix.
"""

from __future__ import annotations

from collections.abc import Iterable


class AckTracker:
    """The settled tags of one channel. Tags count from 1."""

    def __init__(self) -> None:
        self._floor = 0
        """All tags up to this one are settled."""
        self._beyond: set[int] = set()
        """Settled tags above the floor."""

    def settle(self, tags: Iterable[int]) -> list[tuple[int, bool]]:
        """The frames to send, as (tag, multiple). Tags that were settled before are ignored."""
        fresh = sorted({tag for tag in tags if tag > self._floor and tag not in self._beyond})
        taken = 0
        reach = self._floor
        while True:
            if taken < len(fresh) and fresh[taken] == reach + 1:
                taken += 1
            elif reach + 1 in self._beyond:
                self._beyond.discard(reach + 1)
            else:
                break
            reach += 1
        self._floor = reach
        singles = fresh[taken:]
        self._beyond.update(singles)
        prefix = [(fresh[taken - 1], taken > 1)] if taken else []
        return prefix + [(tag, False) for tag in singles]
