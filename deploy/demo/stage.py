"""The state of the show: which scene plays, how far it is, what was said, what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from crew import Crew, Job
from watching import Gauges, Wire

SCENE_TIMEOUT_S = 120.0
"""A scene that takes longer has failed."""

PROGRESS_INTERVAL_S = 2.0
"""Where nobody sees the live screen, progress becomes a line this often."""


@dataclass(frozen=True)
class Fact:
    """Something that the demo claims, with the figure that was counted, and whether it came true."""

    claim: str
    figure: str
    true: bool


@dataclass
class Scene:
    title: str
    play: Callable[[Stage], Awaitable[list[Fact]]]
    facts: list[Fact] = field(default_factory=list)
    progress: str = ""
    took_s: float | None = None

    @property
    def true(self) -> bool:
        return bool(self.facts) and all(fact.true for fact in self.facts)


@dataclass
class Stage:
    """What scenes play with. ``on_line`` is called with each line that is said, and now and then with the progress."""

    scenes: list[Scene]
    jobs: list[Job]
    crew: Crew
    wire: Wire
    gauges: Gauges
    on_line: Callable[[str], None] = lambda line: None
    current: Scene | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    began_at: float = field(default_factory=time.monotonic)
    line_at_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_at

    def say(self, text: str) -> None:
        self.lines.append(self._tell(text))

    def progress(self, text: str) -> None:
        """How far the current scene is."""
        if self.current is not None:
            self.current.progress = text
        if self.elapsed_s - self.line_at_s > PROGRESS_INTERVAL_S:
            self._tell(f"  {text}")

    def _tell(self, text: str) -> str:
        line = f"{self.elapsed_s:5.1f} s  {text}"
        self.line_at_s = self.elapsed_s
        self.on_line(line)
        return line

    async def play_all(self) -> bool:
        """Play the scenes one after the other; True if all that they claim came true.

        Raises:
            WorkerFailed: a worker process does not start.
        """
        self.say(f"{len(self.jobs)} worker processes start")
        await asyncio.gather(*(self.crew.hire(job) for job in self.jobs))
        for scene in self.scenes:
            await self._play(scene)
        self.current = None
        return all(scene.true for scene in self.scenes)

    async def _play(self, scene: Scene) -> None:
        self.current = scene
        self.say(scene.title)
        self.gauges.forget()
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(SCENE_TIMEOUT_S):
                scene.facts = await scene.play(self)
        except TimeoutError:
            scene.facts = [Fact(scene.title, f"not over after {SCENE_TIMEOUT_S:g} s: {scene.progress}", False)]
        except Exception as error:  # the show goes on, and says at its end what went wrong
            scene.facts = [Fact(scene.title, f"{type(error).__name__}: {error}", False)]
        scene.took_s = time.monotonic() - began_at
        scene.progress = f"{scene.took_s:.0f} s"
        for fact in scene.facts:
            self.say(f"{'✓' if fact.true else '✗'} {fact.claim}: {fact.figure}")
