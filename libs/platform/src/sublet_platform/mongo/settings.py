"""The settings of a deployment in MongoDB: one document of the collection ``settings``."""

from __future__ import annotations

from collections.abc import Mapping

from sublet_platform.mongo.client import Mongo


class MongoSettingsStore:
    """See `ports.SettingsStore`."""

    def __init__(self, mongo: Mongo) -> None:
        self._mongo = mongo

    async def claim(self, settings: Mapping[str, int | str]) -> Mapping[str, int | str]:
        stored = await self._mongo.set_once("settings", "fixed", {"values": dict(settings)})
        values: Mapping[str, int | str] = stored["values"]
        return values
