"""What can go wrong with a run and its worker, as a stage carries it out: each begins at once when it is called."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from simulation.scenarios.scenario import Scenario
from simulation.system.simulated_system import ProcessRole

AWAY_S = 40.0
"""Longer than a worker may be silent."""

Impact = Literal["none", "dies", "is away", "freezes", "hangs", "leaves", "leaves twice", "cancelled"]
"""What it does to the lease that the worker holds. Away: its code runs on, but nobody hears of it."""


@dataclass(frozen=True)
class Trouble:
    text: str
    harm: Impact
    begin: Callable[[Scenario, ProcessRole], None]
    of_the_run: bool = False
    """It is the client who does something with the run."""


def kill(stage: Scenario, role: ProcessRole) -> None:
    stage.world.kill(role, flush=True)


def power_off(stage: Scenario, role: ProcessRole) -> None:
    stage.world.kill(role, flush=False)


def cut(down_s: float) -> Callable[[Scenario, ProcessRole], None]:
    return lambda _, role: role.cut(down_s)


def stop_broker(down_s: float) -> Callable[[Scenario, ProcessRole], None]:
    def begin(stage: Scenario, _: ProcessRole) -> None:
        stage.world.cluster.stop()
        stage.trouble(_later(down_s, stage.world.cluster.start))

    return begin


def time_out_tickets(stage: Scenario, _: ProcessRole) -> None:
    stage.world.cluster.time_out_deliveries(held_s=-1.0)


def freeze(for_s: float, *, cut_after_s: float | None = None) -> Callable[[Scenario, ProcessRole], None]:
    """``cut_after_s``: then the broker gives its connection up."""

    def begin(stage: Scenario, role: ProcessRole) -> None:
        role.process.frozen = True
        stage.trouble(_later(for_s, lambda: stage.world.loop.thaw(role.process)))
        if cut_after_s is not None:
            stage.trouble(_later(cut_after_s, lambda: role.cut(for_s - cut_after_s + 0.01)))

    return begin


def stop(stage: Scenario, role: ProcessRole) -> None:
    stage.trouble(stage.world.stop(role.name))


def stop_twice(stage: Scenario, role: ProcessRole) -> None:
    """The second signal comes a moment after the first."""
    stop(stage, role)
    stage.trouble(_later(0.05, lambda: kill(stage, role)))


def cancel(stage: Scenario, _: ProcessRole) -> None:
    assert stage.prompter.run_id is not None
    stage.ask(stage.world.client.runs.aio_cancel(stage.prompter.run_id))


def replay(stage: Scenario, _: ProcessRole) -> None:
    """It must be refused."""
    assert stage.prompter.run_id is not None
    run_id = stage.prompter.run_id

    async def ask() -> None:
        try:
            await stage.world.client.runs.aio_replay(run_id)
        except ValueError:
            return
        stage.world.complain("a run that goes on was replayed")

    stage.ask(ask())


def kill_scheduler(stage: Scenario, _: ProcessRole) -> None:
    scheduler = stage.world.roles["scheduler-0"]
    stage.world.kill(scheduler, flush=True)
    stage.trouble(_start_later(stage, "scheduler-0", 3.0))


async def _later(after_s: float, act: Callable[[], None]) -> None:
    await asyncio.sleep(after_s)
    act()


async def _start_later(stage: Scenario, name: str, after_s: float) -> None:
    await asyncio.sleep(after_s)
    await stage.world.start(name)


FAILURES = (
    Trouble("its worker is killed", "dies", kill),
    Trouble("the power of its worker fails", "dies", power_off),
    Trouble("its worker loses its connection for a moment", "none", cut(2.0)),
    Trouble("its worker loses its connection for long", "is away", cut(AWAY_S)),
    Trouble("the broker restarts", "none", stop_broker(2.0)),
    Trouble("the broker is away for long", "none", stop_broker(AWAY_S)),
    Trouble("the broker loses patience with its ticket", "none", time_out_tickets),
    Trouble("its worker is told to stop", "leaves", stop),
    Trouble("its worker is told to stop twice", "leaves twice", stop_twice),
    Trouble("its worker freezes for a moment", "none", freeze(3.0)),
    Trouble("its worker freezes until its connection is gone", "freezes", freeze(AWAY_S, cut_after_s=25.0)),
    Trouble("its worker hangs for long", "hangs", freeze(AWAY_S)),
    Trouble("its scheduler is killed", "none", kill_scheduler),
    Trouble("it is cancelled", "cancelled", cancel, of_the_run=True),
    Trouble("its replay is asked for", "none", replay, of_the_run=True),
)
