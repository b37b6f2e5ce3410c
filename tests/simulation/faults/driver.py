"""Faults: drawn from the seed, injected into the simulated system.

============== ===================================================================================================
kind           what happens (``for_s``: duration; ``steps``: after that many more steps of the process)
============== ===================================================================================================
crash          the process dies, and another takes its role after ``for_s``; data that it had written to its sockets
               arrives with ``probability``
stop           it shuts down gracefully, and another takes its role after ``for_s``
freeze         it takes no step; its connection may break halfway
cut            its connection breaks, and is restored after ``for_s``
broker         the broker is down: transient messages are lost
unconfirmed    with ``probability`` the connection breaks after a publish took place, before its confirm
doubled        with ``probability`` a message arrives twice, up to ``for_s`` apart
delayed        messages take up to ``for_s`` longer, independently in each pipe
refusing       with ``probability`` a database operation fails before it took effect
forgetting     with ``probability`` it fails after it took effect
half           with ``probability`` a bulk write fails after a part of it took effect
slow           database operations take up to ``probability`` seconds longer
timeout        the broker closes each channel that has held a delivery for longer than ``for_s``
stepdown       the database changes its primary: current operations take effect but fail, then all are refused
rolling        all processes of the kind restart, one after the other; workers register a new version
clock          the clock of a process is set, forwards or back (`Fault.jump_s`)
garbage        messages that cannot be decoded
============== ===================================================================================================
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from simulation.scenarios.plan import Fault, Plan
from simulation.system.storage import Condition
from sublet_platform.ports import Outgoing
from sublet_protocol.topology import EVENTS, INGEST, REQUESTS, TIMERS

if TYPE_CHECKING:
    from simulation.system.simulated_system import ProcessRole, SimulatedSystem

LAST_FAULT_S = 40.0
"""No fault begins after this time."""

HEALED_AT_S = 55.0
"""All faults have ended by this time."""

WEIGHTS = {
    "crash": 10,
    "stop": 3,
    "freeze": 5,
    "cut": 5,
    "broker": 2,
    "unconfirmed": 4,
    "doubled": 3,
    "delayed": 4,
    "refusing": 3,
    "forgetting": 4,
    "half": 3,
    "slow": 3,
    "timeout": 2,
    "stepdown": 2,
    "rolling": 2,
    "clock": 2,
    "garbage": 1,
}
FOR_ALL = ("broker", "doubled", "delayed", "timeout", "stepdown", "garbage")
STEP_DOWN_S = 0.05
MANY = 16
GARBAGE = b"[{]"


def draw_faults(random: Random, plan: Plan, kinds: Sequence[str] = ()) -> Plan:
    """Add clock skew and faults. One seed in eight has none. ``kinds``: many faults, only of these kinds."""
    if kinds:
        faults = [_draw(random, random.choice(kinds), plan) for _ in range(MANY)]
        return dataclasses.replace(plan, faults=tuple(sorted(faults, key=lambda fault: fault.at_s)))
    if random.random() < 0.12:
        return plan
    skew_s = {}
    if random.random() < 0.3:
        skew_s = {role: random.uniform(-1, 1) * random.choice((0.01, 0.5, 2.0)) for role in plan.roles}
    drawn = random.sample(list(WEIGHTS), k=random.randint(1, len(WEIGHTS)), counts=list(WEIGHTS.values()))
    faults = [_draw(random, random.choice(drawn), plan) for _ in range(random.choice((1, 2, 4, 8, MANY)))]
    return dataclasses.replace(plan, skew_s=skew_s, faults=tuple(sorted(faults, key=lambda fault: fault.at_s)))


def _draw(random: Random, kind: str, plan: Plan) -> Fault:
    weights = [{"scheduler": 5, "worker": 4}.get(role.partition("-")[0], 2) for role in plan.roles]
    (role,) = random.choices(plan.roles, weights)
    if kind in FOR_ALL or (kind in ("refusing", "forgetting", "half", "slow") and random.random() < 0.3):
        role = ""
    elif kind == "unconfirmed" and random.random() < 0.2:
        role = "client-0"
    steps = random.choice((0, random.randint(1, 30), random.randint(1, 300))) if kind in STEPPED else 0
    for_s = random.choice((0.0, random.random(), random.random() * 6, random.random() * 14))
    if kind == "freeze" and random.random() < 0.4:
        for_s = random.random() * 40
    return Fault(
        at_s=random.random() * LAST_FAULT_S * random.choice((0.3, 1.0)),
        kind=kind,
        role=role,
        steps=steps,
        for_s=round(for_s, 3),
        probability=random.choice((0.1, 0.4, 1.0)) if kind not in ("doubled",) else random.choice((0.02, 0.2)),
    )


STEPPED = ("crash", "stop", "freeze", "cut")


class Driver:
    """Injects faults. ``injected`` counts the faults whose target process existed."""

    def __init__(self, system: SimulatedSystem, random: Random) -> None:
        self._system = system
        self._random = random
        self.injected = 0

    async def run(self, faults: tuple[Fault, ...]) -> None:
        """Return when all faults have ended."""
        await asyncio.gather(*(self._one(fault) for fault in faults))

    async def _one(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        if fault.kind in STEPPED:
            role = self._system.roles.get(fault.role)
            if role is not None and await self._hit(fault, role):
                self.injected += 1
                await getattr(self, f"_after_{fault.kind}")(fault, role)
        else:
            self.injected += 1
            self._system.note(str(fault))
            await getattr(self, f"_{fault.kind}")(fault)

    # --- processes ----------------------------------------------------------------------------------------------

    async def _hit(self, fault: Fault, role: ProcessRole) -> bool:
        """Inject the fault at once, or at a later step of the process. False: the process has ended before."""

        def hit() -> None:
            self._system.note(str(fault))
            getattr(self, f"_hit_{fault.kind}")(fault, role)

        if not fault.steps:
            hit()
            return True
        return await self._system.after_steps(role, fault.steps, hit)

    def _hit_crash(self, fault: Fault, role: ProcessRole) -> None:
        self._system.kill(role, flush=self._random.random() < fault.probability)

    async def _after_crash(self, fault: Fault, role: ProcessRole) -> None:
        await asyncio.sleep(fault.for_s)
        await self._system.start(fault.role)

    def _hit_stop(self, fault: Fault, role: ProcessRole) -> None:
        """`_after_stop` stops it."""

    async def _after_stop(self, fault: Fault, role: ProcessRole) -> None:
        if await self._system.stop(fault.role):
            await asyncio.sleep(fault.for_s)
            await self._system.start(fault.role)

    async def _rolling(self, fault: Fault) -> None:
        role = fault.role.partition("-")[0]
        if role == "worker":
            self._system.version += 1
        for name in self._system.plan.roles:
            if name.startswith(role) and await self._system.stop(name):
                await asyncio.sleep(fault.for_s / 10)
                await self._system.start(name)

    def _hit_freeze(self, fault: Fault, role: ProcessRole) -> None:
        role.process.frozen = True

    async def _after_freeze(self, fault: Fault, role: ProcessRole) -> None:
        await asyncio.sleep(fault.for_s / 2)
        if fault.probability > 0.3 and not role.process.gone:
            role.cut(fault.for_s / 2 + 0.01)
        await asyncio.sleep(fault.for_s / 2)
        self._system.loop.thaw(role.process)

    def _hit_cut(self, fault: Fault, role: ProcessRole) -> None:
        role.cut(fault.for_s)

    async def _after_cut(self, fault: Fault, role: ProcessRole) -> None:
        """The connection restores itself."""

    async def _clock(self, fault: Fault) -> None:
        role = self._system.roles.get(fault.role)
        if role is not None:
            role.process.clock.skew_s += fault.jump_s

    # --- the broker ---------------------------------------------------------------------------------------------

    async def _broker(self, fault: Fault) -> None:
        cluster = self._system.cluster
        if cluster.running:
            cluster.stop()
            await asyncio.sleep(fault.for_s)
            cluster.start()

    async def _timeout(self, fault: Fault) -> None:
        self._system.cluster.time_out_deliveries(fault.for_s)

    async def _unconfirmed(self, fault: Fault) -> None:
        role = self._system.roles.get(fault.role)
        if role is None:
            return
        for link in role.links:
            link.loses_confirms = fault.probability
        await asyncio.sleep(fault.for_s)
        for link in role.links:
            link.loses_confirms = 0.0

    async def _doubled(self, fault: Fault) -> None:
        conditions = self._system.cluster.conditions
        conditions.doubling, conditions.doubled_after_s = fault.probability, fault.for_s
        await asyncio.sleep(fault.for_s)
        conditions.doubling = 0.0

    async def _delayed(self, fault: Fault) -> None:
        conditions = self._system.cluster.conditions
        conditions.delay_s = fault.for_s * fault.probability
        await asyncio.sleep(fault.for_s)
        conditions.delay_s = 0.0

    async def _garbage(self, fault: Fault) -> None:
        addresses = [(REQUESTS, "bucket.00"), ("", TIMERS), ("", INGEST), (EVENTS, "paid")]
        for exchange, key in addresses:
            self._system.garbage += 1
            await self._system.publish(Outgoing(exchange, key, GARBAGE))

    # --- the database -------------------------------------------------------------------------------------------

    async def _refusing(self, fault: Fault) -> None:
        await self._store(fault, Condition(refuses=fault.probability))

    async def _forgetting(self, fault: Fault) -> None:
        await self._store(fault, Condition(forgets_to_answer=fault.probability))

    async def _half(self, fault: Fault) -> None:
        await self._store(fault, Condition(half_done=fault.probability))

    async def _slow(self, fault: Fault) -> None:
        await self._store(fault, Condition(slow_s=fault.probability * 4))

    async def _stepdown(self, fault: Fault) -> None:
        await self._store(dataclasses.replace(fault, for_s=STEP_DOWN_S), Condition(forgets_to_answer=1.0))
        await self._store(fault, Condition(refuses=1.0))

    async def _store(self, fault: Fault, condition: Condition) -> None:
        conditions = self._system.database.conditions
        conditions[fault.role] = condition
        await asyncio.sleep(fault.for_s)
        if conditions.get(fault.role) is condition:
            del conditions[fault.role]
