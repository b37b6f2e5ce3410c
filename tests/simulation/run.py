"""Runs the simulation over many seeds, on all cores.

    deploy/local simulate [--seeds 200] [--first-seed 0] [--verbose]

Ends with one line of figures. A seed that fails is printed with what was violated and the command that repeats it;
``--verbose`` with a single seed tells its whole story.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not this folder: it has a module of its own name

from simulation.simulation import Outcome, simulate  # noqa: E402
from simulation.workloads import draw_plan  # noqa: E402


def main() -> int:
    arguments = _arguments()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if arguments.verbose:
        outcomes = [simulate(draw_plan(seed), tell=True) for seed in seeds]
        print("\n".join(line for outcome in outcomes for line in outcome.story))
    else:
        # Each seed has a world of its own; a process that has seen many is replaced, as worlds are large.
        with multiprocessing.Pool(os.cpu_count(), maxtasksperchild=50) as pool:
            outcomes = list(map(_told, pool.imap_unordered(_simulate, seeds)))
    failed = sum(bool(outcome.violations) for outcome in outcomes)
    print(
        f"{len(outcomes)} seeds from {arguments.first_seed}: {sum(o.runs for o in outcomes):,} runs, "
        f"{sum(o.faults for o in outcomes):,} faults, {sum(o.virtual_s for o in outcomes) / 3600:,.1f} virtual hours, "
        f"{sum(o.steps for o in outcomes):,} steps; {failed} failed"
    )
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="tell what happened, step by step")
    return parser.parse_args()


def _simulate(seed: int) -> Outcome:
    return simulate(draw_plan(seed))


def _told(outcome: Outcome) -> Outcome:
    """Say at once what went wrong, and how to see it again."""
    if outcome.violations:
        print(f"seed {outcome.seed} failed:", *outcome.violations[:5], sep="\n  ", flush=True)
        print(f"  again: deploy/local simulate --seeds 1 --first-seed {outcome.seed} --verbose", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
