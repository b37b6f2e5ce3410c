"""Displays the demo: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

from demo_run import DemoRun, Scenario
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

REFRESHES_PER_S = 8


class TerminalView:
    """A context manager that displays the demo while it is open."""

    def __init__(self, demo: DemoRun, console: Console) -> None:
        self._demo = demo
        self._console = console
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=console, refresh_per_second=REFRESHES_PER_S, screen=False
            )
        else:
            demo.on_line = self._print

    def __enter__(self) -> TerminalView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(self._scenarios(), Text(), self._gauges(), Text(), *(Text(line) for line in self._demo.lines))

    def _scenarios(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "", Text("Sublet: a task that waits holds no slot", style="bold"), f"{self._demo.elapsed_s:.0f} s"
        )
        for scenario in self._demo.scenarios:
            table.add_row(self._mark(scenario), scenario.title, Text(scenario.progress, style="cyan"))
        return table

    def _mark(self, scenario: Scenario) -> RenderableType:
        if scenario is self._demo.current:
            return self._spinner
        if scenario.took_s is None:
            return Text("·", style="dim")
        return Text("✓", style="green") if scenario.passed else Text("✗", style="red")

    def _gauges(self) -> RenderableType:
        gauges = self._demo.gauges
        workers = (
            ", ".join(f"{name} (pid {worker.pid})" for name, worker in self._demo.workers.running.items()) or "none"
        )
        lines = [Text(f"Workers  {workers}")]
        if not gauges.known:
            lines.append(Text("Slots    set SUBLET_SCHEDULER_METRICS_URLS to see them", style="dim"))
            return Group(*lines)
        for (pool, kind), (total, taken) in sorted(gauges.slots.items()):
            boxes = "■" * taken + "□" * (total - taken)
            lines.append(Text(f"Slots    {pool:<10} {kind:<8} {boxes}  {taken} taken, {total - taken} free"))
        waiting = ", ".join(f"{count} for {reason}" for reason, count in sorted(gauges.waiting.items())) or "none"
        lines.append(Text(f"Waiting  {waiting}", style="yellow"))
        return Group(*lines)


def results_table(scenarios: list[Scenario]) -> Table:
    """The checks of all scenarios, with their figures."""
    table = Table(title="Results", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("Claim")
    table.add_column("Counted")
    for scenario in scenarios:
        table.add_section()
        took = f"{scenario.took_s:.0f} s" if scenario.took_s is not None else "not run"
        table.add_row("", Text(scenario.title, style="bold"), Text(took, style="dim"))
        for check in scenario.checks:
            mark = Text("✓", style="green") if check.passed else Text("✗", style="red")
            table.add_row(mark, Text(check.claim), Text(check.figure))
    return table
