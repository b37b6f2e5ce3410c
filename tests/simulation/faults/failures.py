"""What can fail while a worker executes a run. Each failure begins as soon as a scenario calls ``begin``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from simulation.scenarios.scenario import Scenario
from simulation.system.simulated_system import ProcessRole

AWAY_S = 40.0
"""Longer than a worker may be silent."""

Impact = Literal["none", "dies", "is disconnected", "freezes", "hangs", "stops", "stops twice", "cancelled"]
"""The effect on the lease that the worker holds. Disconnected: its code continues, but its reports do not arrive."""


@dataclass(frozen=True)
class Failure:
    text: str
    impact: Impact
    begin: Callable[[Scenario, ProcessRole], None]
    of_the_run: bool = False
    """True if the client acts on the run; False if something fails."""


def kill(scenario: Scenario, role: ProcessRole) -> None:
    scenario.system.kill(role, flush=True)


def power_off(scenario: Scenario, role: ProcessRole) -> None:
    scenario.system.kill(role, flush=False)


def cut(down_s: float) -> Callable[[Scenario, ProcessRole], None]:
    return lambda _, role: role.cut(down_s)


def stop_broker(down_s: float) -> Callable[[Scenario, ProcessRole], None]:
    def begin(scenario: Scenario, _: ProcessRole) -> None:
        scenario.system.cluster.stop()
        scenario.run_in_background(_later(down_s, scenario.system.cluster.start))

    return begin


def time_out_tickets(scenario: Scenario, _: ProcessRole) -> None:
    scenario.system.cluster.time_out_deliveries(held_s=-1.0)


def freeze(for_s: float, *, cut_after_s: float | None = None) -> Callable[[Scenario, ProcessRole], None]:
    """``cut_after_s``: after this time the broker closes the connection of the frozen process."""

    def begin(scenario: Scenario, role: ProcessRole) -> None:
        role.process.frozen = True
        scenario.run_in_background(_later(for_s, lambda: scenario.system.loop.thaw(role.process)))
        if cut_after_s is not None:
            scenario.run_in_background(_later(cut_after_s, lambda: role.cut(for_s - cut_after_s + 0.01)))

    return begin


def stop(scenario: Scenario, role: ProcessRole) -> None:
    scenario.run_in_background(scenario.system.stop(role.name))


def stop_twice(scenario: Scenario, role: ProcessRole) -> None:
    """The second signal arrives 50 ms after the first."""
    stop(scenario, role)
    scenario.run_in_background(_later(0.05, lambda: kill(scenario, role)))


def cancel(scenario: Scenario, _: ProcessRole) -> None:
    assert scenario.trigger_watcher.run_id is not None
    scenario.ask(scenario.system.client.runs.aio_cancel(scenario.trigger_watcher.run_id))


def replay(scenario: Scenario, _: ProcessRole) -> None:
    """The replay of a run that has not ended must be refused."""
    assert scenario.trigger_watcher.run_id is not None
    run_id = scenario.trigger_watcher.run_id

    async def ask() -> None:
        try:
            await scenario.system.client.runs.aio_replay(run_id)
        except ValueError:
            return
        scenario.system.report_violation("a run that had not ended was replayed")

    scenario.ask(ask())


def kill_scheduler(scenario: Scenario, _: ProcessRole) -> None:
    scheduler = scenario.system.roles["scheduler-0"]
    scenario.system.kill(scheduler, flush=True)
    scenario.run_in_background(_start_later(scenario, "scheduler-0", 3.0))


async def _later(after_s: float, act: Callable[[], None]) -> None:
    await asyncio.sleep(after_s)
    act()


async def _start_later(scenario: Scenario, name: str, after_s: float) -> None:
    await asyncio.sleep(after_s)
    await scenario.system.start(name)


FAILURES = (
    Failure("its worker is killed", "dies", kill),
    Failure("its worker's machine loses power", "dies", power_off),
    Failure("its worker loses its connection briefly", "none", cut(2.0)),
    Failure("its worker loses its connection for long", "is disconnected", cut(AWAY_S)),
    Failure("the broker restarts", "none", stop_broker(2.0)),
    Failure("the broker is away for long", "none", stop_broker(AWAY_S)),
    Failure("the broker times out the delivery of its ticket", "none", time_out_tickets),
    Failure("its worker is asked to stop", "stops", stop),
    Failure("its worker is asked to stop twice", "stops twice", stop_twice),
    Failure("its worker freezes briefly", "none", freeze(3.0)),
    Failure("its worker freezes until its connection is gone", "freezes", freeze(AWAY_S, cut_after_s=25.0)),
    Failure("its worker hangs for long", "hangs", freeze(AWAY_S)),
    Failure("its scheduler is killed", "none", kill_scheduler),
    Failure("it is cancelled", "cancelled", cancel, of_the_run=True),
    Failure("its replay is requested", "none", replay, of_the_run=True),
)
