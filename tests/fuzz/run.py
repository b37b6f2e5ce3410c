"""The long form of the fuzzing: `deploy/local fuzz [--minutes N] [--target NAME]`.

Each target runs in a process of its own for as long. With atheris the inputs follow the coverage of Sublet's code, and
those that found something new are kept in .sublet/fuzz/; where it has no wheel they are mutations by chance alone. An
input that a target does not survive is written down, and named with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
FOUND = ROOT / ".sublet" / "fuzz"
MEMORY_MAX_BYTES = 2 * 1024**3
"""An input that needs more memory is reported as a failure."""
INPUT_MAX_BYTES = 200_000
INPUT_MAX_S = 20
"""An input that takes longer is reported as a failure."""
SHELL_MESSAGES_MAX = 4


def main() -> int:
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="deploy/local fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append", help="instead of all of them; may be repeated")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="run one input that was found, on the --target")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.target or list(TARGETS)
    if arguments.repeat:
        TARGETS[names[0]].attack(arguments.repeat.read_bytes())
        return 0
    if arguments.child:
        _bounded_memory()
        return _attack_for(names[0], arguments.minutes * 60)
    failed = [name for name in names if not _survives(name, arguments.minutes)]
    print(
        f"{len(names) - len(failed)} of {len(names)} targets survived" + "".join(f"\n  NOT {name}" for name in failed)
    )
    return 1 if failed else 0


def _survives(name: str, minutes: float) -> bool:
    print(f"==> {name}", flush=True)
    command = [sys.executable, __file__, "--child", "--target", name, "--minutes", str(minutes)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def _bounded_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MAX_BYTES, MEMORY_MAX_BYTES))


def _attack_for(name: str, seconds: float) -> int:
    try:
        import atheris
    except ImportError:
        print("(without atheris: mutations by chance)", flush=True)
        return _by_chance(name, seconds)
    from fuzz import targets

    target, kept = targets.TARGETS[name], FOUND / name
    kept.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (kept / f"seed-{number}").write_bytes(seed)
    for module in [module for name, module in sys.modules.items() if name.startswith("sublet")]:
        _instrument(atheris, module)
    options = [
        f"-max_total_time={int(seconds)}",
        f"-max_len={INPUT_MAX_BYTES}",
        f"-timeout={INPUT_MAX_S}",
        "-rss_limit_mb=0",
        f"-artifact_prefix={FOUND}/{name}-",
        "-print_final_stats=1",
        "-verbosity=0",
        "-detect_leaks=0",
    ]
    atheris.Setup(
        [sys.argv[0], *options, str(kept)],
        target.attack,
        custom_mutator=lambda data, limit, seed: _mutation(data, random.Random(seed), name)[:limit],
    )
    atheris.Fuzz()
    return 0


def _instrument(atheris: Any, module: ModuleType) -> None:
    """Have the coverage of a module's own functions and methods followed."""
    waiting = list(vars(module).values())
    while waiting:
        thing = waiting.pop()
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if isinstance(thing, FunctionType):
            atheris.instrument_func(thing)
        elif isinstance(thing, type):
            waiting += [part for part in vars(thing).values() if isinstance(part, FunctionType)]


def _mutation(data: bytes, chance: random.Random, name: str) -> bytes:
    from fuzz.mutation import SEPARATOR, mutated
    from fuzz.targets import TARGETS

    if not name.endswith("-shell"):
        return mutated(data, chance)
    bodies = [mutated(body, chance) for body in data.split(SEPARATOR)[:SHELL_MESSAGES_MAX]]
    if len(bodies) < SHELL_MESSAGES_MAX:
        bodies.append(mutated(chance.choice(TARGETS[name].seeds), chance))
    return SEPARATOR.join(bodies)


def _by_chance(name: str, seconds: float) -> int:
    from fuzz.targets import TARGETS

    target = TARGETS[name]
    began, count, slowest_s = time.monotonic(), 0, 0.0
    while time.monotonic() - began < seconds:
        data = _mutation(random.Random(count).choice(target.seeds), random.Random(count), name)
        count += 1
        before = time.monotonic()
        try:
            target.attack(data)
        except BaseException:
            traceback.print_exc()
            FOUND.mkdir(parents=True, exist_ok=True)
            found = FOUND / f"{name}-crash-{os.getpid()}"
            found.write_bytes(data)
            print(f"after {count} inputs; again: deploy/local fuzz --target {name} --repeat {found}", flush=True)
            return 1
        slowest_s = max(slowest_s, time.monotonic() - before)
    print(f"{count:,} inputs, the slowest took {slowest_s:.2f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
