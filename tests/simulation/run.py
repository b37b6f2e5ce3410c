"""Runs the simulation over many seeds, on all cores.

    deploy/local simulate [--seeds 200] [--first-seed 0] [--digests FILE] [--shrink SEED] [--story SEED]

Ends with one line of figures. For a seed that fails, the violations are printed, and the command that runs it again and
shrinks it to a short trace. ``--story`` prints everything that happens in a seed, message by message.
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
        return _print_story(arguments.story)
    return _simulate_all(range(arguments.first_seed, arguments.first_seed + arguments.seeds), arguments.digests)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed")
    parser.add_argument("--shrink", type=int, metavar="SEED", help="shrink a failing seed, and print what happens")
    parser.add_argument("--digests", metavar="FILE", help="write the digest of each seed, to compare two versions")
    parser.add_argument("--story", type=int, metavar="SEED", help="print what happens in a seed, message by message")
    return parser.parse_args()


def _simulate_all(seeds: range, digests: str | None) -> int:
    # Simulated systems are large, so a process is replaced after 50 seeds.
    with multiprocessing.Pool(os.cpu_count(), maxtasksperchild=50) as pool:
        outcomes = list(map(_print_failure, pool.imap_unordered(_simulate, seeds)))
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


def _print_failure(outcome: Outcome) -> Outcome:
    """Print violations at once, with the command that reproduces them."""
    if outcome.violations:
        print(f"seed {outcome.seed} failed:", *outcome.violations[:5], sep="\n  ", flush=True)
        print(f"  to reproduce and shrink it: deploy/local simulate --shrink {outcome.seed}", flush=True)
    return outcome


def _print_story(seed: int) -> int:
    outcome = simulate(draw_plan(seed), verbose=True)
    print(*outcome.story, sep="\n")
    return 1 if outcome.violations else 0


def _shrink(seed: int) -> int:
    plan = draw_plan(seed)
    if not simulate(plan).violations:
        print(f"seed {seed} does not fail")
        return 0
    small, outcome = shrink(plan)
    print("Smallest failing plan:", *in_words(small), sep="\n  ")
    print("What happens:", *trace(small), sep="\n  ")
    print("Violated:", *outcome.violations[:5], sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())
