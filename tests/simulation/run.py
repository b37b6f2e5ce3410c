"""Runs the simulation over many seeds, on all cores.

    deploy/local simulate [--seeds 200] [--first-seed 0] [--digests FILE] [--shrink SEED] [--story SEED]

Ends with one line of figures. A seed that fails is printed with what was violated and the command that repeats it and
cuts it down to a short trace; ``--story`` tells a seed whole, message by message.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not this folder: it has a module of its own name

from simulation.scenarios.shrinking import in_words, shrink, trace  # noqa: E402
from simulation.scenarios.workloads import draw_plan  # noqa: E402
from simulation.simulation import Outcome, simulate  # noqa: E402


def main() -> int:
    arguments = _arguments()
    if arguments.shrink is not None:
        return _shrink(arguments.shrink)
    if arguments.story is not None:
        return _tell(arguments.story)
    return _simulate_all(range(arguments.first_seed, arguments.first_seed + arguments.seeds), arguments.digests)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--shrink", type=int, metavar="SEED", help="cut a seed that fails down, and tell what happens")
    parser.add_argument("--digests", metavar="FILE", help="write the digest of each seed, to compare two versions")
    parser.add_argument("--story", type=int, metavar="SEED", help="tell what happens in a seed, message by message")
    return parser.parse_args()


def _simulate_all(seeds: range, digests: str | None) -> int:
    # Each seed has a world of its own; a process that has seen many is replaced, as worlds are large.
    with multiprocessing.Pool(os.cpu_count(), maxtasksperchild=50) as pool:
        outcomes = list(map(_told, pool.imap_unordered(_simulate, seeds)))
    failed = sum(bool(outcome.violations) for outcome in outcomes)
    print(
        f"{len(outcomes)} seeds from {seeds.start}: {sum(o.runs for o in outcomes):,} runs, "
        f"{sum(o.faults for o in outcomes):,} faults, {sum(o.virtual_s for o in outcomes) / 3600:,.1f} virtual hours, "
        f"{sum(o.steps for o in outcomes):,} steps; {failed} failed"
    )
    if digests is not None:
        lines = sorted((outcome.seed, outcome.digest) for outcome in outcomes)
        Path(digests).write_text("".join(f"{seed} {digest:08x}\n" for seed, digest in lines))
    return 1 if failed else 0


def _simulate(seed: int) -> Outcome:
    return simulate(draw_plan(seed))


def _told(outcome: Outcome) -> Outcome:
    """Say at once what went wrong, and how to see it again."""
    if outcome.violations:
        print(f"seed {outcome.seed} failed:", *outcome.violations[:5], sep="\n  ", flush=True)
        print(f"  again, and short: deploy/local simulate --shrink {outcome.seed}", flush=True)
    return outcome


def _tell(seed: int) -> int:
    outcome = simulate(draw_plan(seed), tell=True)
    print(*outcome.story, sep="\n")
    return 1 if outcome.violations else 0


def _shrink(seed: int) -> int:
    plan = draw_plan(seed)
    if not simulate(plan).violations:
        print(f"seed {seed} does not fail")
        return 0
    small, outcome = shrink(plan)
    print("This is left:", *in_words(small), sep="\n  ")
    print("And so it goes:", *trace(small), sep="\n  ")
    print("Violated:", *outcome.violations[:5], sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())
