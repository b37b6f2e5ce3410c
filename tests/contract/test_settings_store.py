"""The settings of a deployment: the first service writes them, and they never change."""

from __future__ import annotations

from sublet_platform.ports import SettingsStore


async def test_the_first_claim_fixes_the_settings(settings_store: SettingsStore) -> None:
    assert dict(await settings_store.claim({"shards": 4, "format": 2})) == {"shards": 4, "format": 2}
    assert dict(await settings_store.claim({"shards": 8, "format": 3})) == {"shards": 4, "format": 2}


async def test_a_claim_does_not_complete_older_settings(settings_store: SettingsStore) -> None:
    await settings_store.claim({"shards": 4})
    assert dict(await settings_store.claim({"shards": 4, "format": 2})) == {"shards": 4}
