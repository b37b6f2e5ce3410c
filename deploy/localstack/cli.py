"""The verbs of the command `deploy/local`."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from . import matrix
from .paths import ROOT, LocalError, command, say
from .stack import Addresses, Stack, exclusive_lock, log_files, servers_for_tests
from .tools import install, install_fuzzer

HELP = """\
Usage: deploy/local VERB [ARGUMENTS]

  demo               start everything and show what Sublet does; the status is 0 if all checks pass
  test [ARGUMENTS]   run the tests against a RabbitMQ and a MongoDB of their own; ARGUMENTS go to pytest
  test --full [...]  the same on every Python version that is installed, then many seeds of the simulation
                     (--seeds N); prints what ran and what was not available
  up [--servers]     start RabbitMQ, MongoDB, scheduler, timer and event-ingest (or the two servers only)
  down [--wipe]      stop them (and forget their data)
  status             show each part with its process id, port and health
  logs [NAME]        show the end of all logs, or of one
  simulate [...]     run the simulation
  fuzz [...]         attack every decoder and service with hostile input: --minutes N for each --target NAME
  chaos [...]        kill, freeze and restart every part under load, then audit the result; see chaos -h
  bench [...]        run the benchmarks against the started servers
  install            install what is missing; every verb that needs it does so first
  help               show this text

As root on Debian, missing programs are installed. Otherwise an error names the command that installs them.
Set SUBLET_AMQP_URL and SUBLET_MONGO_URL to use servers that run already (for the tests:
SUBLET_TEST_AMQP_URL and SUBLET_TEST_MONGO_URL). Data and logs are in .sublet/.
"""


def main(arguments: Sequence[str]) -> int:
    verb, *rest = arguments or ["help"]
    if verb in ("-h", "--help"):
        verb = "help"
    action = VERBS.get(verb)
    # A terminated command stops what it has started, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if action is None:
            raise LocalError(f"There is no verb {verb!r}: see `deploy/local help`.")
        return action(rest)
    except LocalError as error:
        print(f"deploy/local: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def show_help(_: list[str]) -> int:
    print(HELP, end="")
    return 0


def install_all(_: list[str]) -> int:
    with exclusive_lock():
        _install()
    say("Everything is installed")
    return 0


def up(arguments: list[str]) -> int:
    for line in _up(servers_only=_flag(arguments, "--servers")).environment().items():
        print("export {}='{}'".format(*line))
    return 0


def down(arguments: list[str]) -> int:
    wipe = _flag(arguments, "--wipe")
    with exclusive_lock():
        stack = Stack()
        stack.down()
        if wipe:
            stack.wipe()
    return 0


def status(_: list[str]) -> int:
    rows = [("NAME", "PID", "PORT", "HEALTH"), *Stack().status()]
    for name, pid, port, health in rows:
        print(f"{name:<14}{pid:<9}{port:<7}{health}")
    return 0 if all(row[3] in ("ok", "elsewhere") for row in rows[1:]) else 1


def logs(arguments: list[str]) -> int:
    service = arguments[0] if arguments else None
    for file in log_files(service):
        lines = file.read_text(errors="replace").splitlines()
        print(f"--- {file}")
        print("\n".join(lines[-(200 if service else 20) :]))
    return 0


def demo(arguments: list[str]) -> int:
    addresses = _up()
    os.environ["SUBLET_SCHEDULER_METRICS_URLS"] = Stack().metrics_url("scheduler")
    outcome = _run_script("deploy/demo/run.py", arguments, addresses)
    say("The stack is still up: `deploy/local status` shows it, `deploy/local down` stops it")
    return outcome


def bench(arguments: list[str]) -> int:
    return _run_script("tests/benchmarks/run.py", arguments, _up())


def simulate(arguments: list[str]) -> int:
    with exclusive_lock():
        install(rabbitmq=False, mongodb=False)
    return _run_script("tests/simulation/run.py", arguments)


def fuzz(arguments: list[str]) -> int:
    with exclusive_lock():
        install(rabbitmq=False, mongodb=False)
        install_fuzzer()
    return _run_script("tests/fuzz/run.py", arguments)


def test(arguments: list[str]) -> int:
    amqp_url, mongo_url = (os.environ.get(f"SUBLET_TEST_{server}_URL") for server in ("AMQP", "MONGO"))
    with exclusive_lock():
        install(rabbitmq=True, mongodb=True)
    if amqp_url and mongo_url:
        return _run_tests(arguments, Addresses(amqp_url, mongo_url))
    say("Starting a RabbitMQ and a MongoDB for the tests")
    with servers_for_tests() as own:
        return _run_tests(arguments, Addresses(amqp_url or own.amqp_url, mongo_url or own.mongo_url))


def chaos(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="deploy/local chaos")
    parser.add_argument("--seeds", default="1,2,3,4,5", help="each seed gives an order of faults (default: 1,2,3,4,5)")
    parser.add_argument("--faults", default="20", help="number of faults for each seed (default: 20)")
    parser.add_argument("--runs", default="2000", help="number of runs for each seed, with children (default: 2000)")
    for name, value in vars(parser.parse_args(arguments)).items():
        os.environ[f"SUBLET_CHAOS_{name.upper()}"] = value
    return test(["-q", "--capture=no", "--timeout=0", "tests/chaos/test_chaos.py"])


def _run_tests(arguments: list[str], addresses: Addresses) -> int:
    parser = argparse.ArgumentParser(prog="deploy/local test", add_help=False, allow_abbrev=False)
    parser.add_argument("--full", action="store_true")
    full, others = parser.parse_known_args(arguments)
    if not full.full:
        return _pytest(arguments, addresses)
    parser.add_argument("--seeds", type=int, default=matrix.SEEDS)
    options, others = parser.parse_known_args(others)
    parts = matrix.parts(
        test=lambda: _pytest(others, addresses),
        simulate=lambda seeds: _run_script("tests/simulation/run.py", ["--seeds", str(seeds)]),
        seeds=options.seeds,
    )
    return matrix.run_all(parts)


def _pytest(arguments: list[str], addresses: Addresses) -> int:
    # The servers are available here, so a test that cannot reach one fails instead of being skipped.
    environment = addresses.environment("SUBLET_TEST") | {"SUBLET_REQUIRE_SERVERS": "1"}
    return subprocess.run(
        [command("pytest"), *arguments], cwd=ROOT, env=os.environ | environment, check=False
    ).returncode


def _up(*, servers_only: bool = False) -> Addresses:
    with exclusive_lock():
        stack = _install()
        if servers_only:
            stack.up_servers()
        else:
            stack.up()
        return stack.addresses


def _install() -> Stack:
    stack = Stack()
    install(rabbitmq=stack.own_rabbit, mongodb=stack.own_mongo)
    return stack


def _run_script(script: str, arguments: list[str], addresses: Addresses | None = None) -> int:
    if not (ROOT / script).exists():
        raise LocalError(f"{script} is not part of this checkout.")
    environment = os.environ | (addresses.environment() if addresses else {})
    return subprocess.run([command("python"), script, *arguments], cwd=ROOT, env=environment, check=False).returncode


def _flag(arguments: list[str], flag: str) -> bool:
    if arguments not in ([], [flag]):
        raise LocalError(f"Unknown arguments {' '.join(arguments)}: see `deploy/local help`.")
    return arguments == [flag]


VERBS: dict[str, Callable[[list[str]], int]] = {
    "bench": bench,
    "chaos": chaos,
    "demo": demo,
    "down": down,
    "fuzz": fuzz,
    "help": show_help,
    "install": install_all,
    "logs": logs,
    "simulate": simulate,
    "status": status,
    "test": test,
    "up": up,
}
