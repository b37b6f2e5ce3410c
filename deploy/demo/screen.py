"""Shows the stage: live on a terminal, as plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from stage import Scene, Stage

REFRESHES_PER_S = 8


class Screen:
    """A context: while it is open, people see what goes on."""

    def __init__(self, stage: Stage, console: Console) -> None:
        self._stage = stage
        self._console = console
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=console, refresh_per_second=REFRESHES_PER_S, screen=False
            )
        else:
            stage.on_line = self._print

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(self._scenes(), Text(), self._gauges(), Text(), *(Text(line) for line in self._stage.lines))

    def _scenes(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row("", Text("Sublet: what waits holds no slot", style="bold"), f"{self._stage.elapsed_s:.0f} s")
        for scene in self._stage.scenes:
            table.add_row(self._mark(scene), scene.title, Text(scene.progress, style="cyan"))
        return table

    def _mark(self, scene: Scene) -> RenderableType:
        if scene is self._stage.current:
            return self._spinner
        if scene.took_s is None:
            return Text("·", style="dim")
        return Text("✓", style="green") if scene.true else Text("✗", style="red")

    def _gauges(self) -> RenderableType:
        gauges = self._stage.gauges
        workers = ", ".join(f"{name} (pid {member.pid})" for name, member in self._stage.crew.members.items()) or "none"
        lines = [Text(f"Workers  {workers}")]
        if not gauges.known:
            lines.append(Text("Slots    set SUBLET_SCHEDULER_METRICS_URLS to see them", style="dim"))
            return Group(*lines)
        for (pool, kind), (total, taken) in sorted(gauges.slots.items()):
            boxes = "■" * taken + "□" * (total - taken)
            lines.append(Text(f"Slots    {pool:<10} {kind:<8} {boxes}  {taken} taken, {total - taken} free"))
        waiting = ", ".join(f"{count} for {reason}" for reason, count in sorted(gauges.waiting.items())) or "nobody"
        lines.append(Text(f"Waiting  {waiting}", style="yellow"))
        return Group(*lines)


def outcome(scenes: list[Scene]) -> Table:
    """What was shown, with its figures."""
    table = Table(title="What was shown", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("Claim")
    table.add_column("Counted")
    for scene in scenes:
        table.add_section()
        took = f"{scene.took_s:.0f} s" if scene.took_s is not None else "not played"
        table.add_row("", Text(scene.title, style="bold"), Text(took, style="dim"))
        for fact in scene.facts:
            mark = Text("✓", style="green") if fact.true else Text("✗", style="red")
            table.add_row(mark, Text(fact.claim), Text(fact.figure))
    return table
