"""A scheduler process as a consumer of one shard: active, or a standby of another process."""

from __future__ import annotations

from sublet_platform.batching import BatchLoop
from sublet_platform.metrics import ServiceMetrics
from sublet_platform.ports import Broker, Consumer
from sublet_protocol import limits
from sublet_protocol.topology import shard_queue
from sublet_scheduler.shard_service import ShardService


class ShardConsumer:
    """Every scheduler consumes the queue of every shard. RabbitMQ serves one of them, the single active consumer; the
    others are standbys, in the order in which they joined."""

    def __init__(self, service: ShardService, inbox: str, broker: Broker, metrics: ServiceMetrics) -> None:
        self.service = service
        self._inbox = inbox
        self._broker = broker
        self._loop = BatchLoop(
            service.process, broker, metrics, name="shard", on_failure=service.drop, on_conflict=service.drop
        )
        self._consumer: Consumer | None = None

    def active(self) -> bool:
        """This process is the active consumer."""
        return self.service.active()

    async def start(self) -> None:
        self._loop.start()
        await self._broker.open_inbox(self._inbox, self._loop.handle, key=self.service.claim_key)
        await self.join()

    async def join(self) -> None:
        """Consume the queue of the shard, as the last standby."""
        if self._consumer is None:
            queue = shard_queue(self.service.index)
            self._consumer = await self._broker.consume(queue, self._loop.handle, prefetch=limits.RUN_PREFETCH)

    async def yield_shard(self) -> None:
        """Requeue the messages that are not handled, and become the last standby."""
        await self._leave()
        self._loop.resume()
        await self.join()

    async def _leave(self) -> None:
        await self._loop.rest()
        if self._consumer is not None:
            await self._consumer.close()
            self._consumer = None
        self.service.drop()

    async def stop(self) -> None:
        await self._leave()
        await self._loop.stop()
