"""The short form: a few dozen mutations of valid messages for each target. `deploy/local fuzz` is the long one."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuzz.mutation import DEEP, SEPARATOR, mutated
from fuzz.targets import TARGETS

EXAMPLES = 60
EXAMPLES_OF_A_SHELL = 15


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid_is_no_attack(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds:
        target.attack(seed)
    target.attack(b"")


@pytest.mark.parametrize("name", [name for name in TARGETS if not name.endswith("-shell")])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
@example(seed=0)
def test_mutations_are_handled_or_refused(name: str, seed: int) -> None:
    _attack(name, Random(seed))


@pytest.mark.parametrize("name", [name for name in TARGETS if name.endswith("-shell")])
@settings(max_examples=EXAMPLES_OF_A_SHELL, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_service_survives_mutations_between_good_messages(name: str, seed: int) -> None:
    _attack(name, Random(seed))


def _attack(name: str, chance: Random) -> None:
    target = TARGETS[name]
    bodies = [mutated(chance.choice(target.seeds), chance) for _ in range(chance.randint(1, 4))]
    if not name.endswith("-shell"):
        bodies = bodies[:1]
    target.attack(SEPARATOR.join(bodies))


@pytest.mark.parametrize("name", TARGETS)
def test_the_worst_that_is_known_is_handled_or_refused(name: str) -> None:
    for known in (b"\xff", b"\0" * 64, b"[" * 100_000, b'[{"t":' * DEEP, b'{"a":1,"a":NaN}', b"9" * 100_000):
        TARGETS[name].attack(known)
