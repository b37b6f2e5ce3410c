"""In-memory adapters of every port, for tests and the simulation. They are deterministic."""

from sublet_platform.memory.broker import MemoryBroker
from sublet_platform.memory.cluster import MemoryCluster
from sublet_platform.memory.database import MemoryDatabase
from sublet_platform.memory.stores import MemoryEventStore, MemoryRunStore, MemorySettingsStore, MemoryTimerStore
from sublet_platform.memory.transport import MemoryTransport

__all__ = [
    "MemoryBroker",
    "MemoryCluster",
    "MemoryDatabase",
    "MemoryEventStore",
    "MemoryRunStore",
    "MemorySettingsStore",
    "MemoryTimerStore",
    "MemoryTransport",
]
