"""What users may import: `sublet` and `sublet.testing`, and nothing else of the package."""

from __future__ import annotations

import pkgutil
from types import ModuleType

import pytest

import sublet
import sublet.testing
from sublet import SubletError

PUBLIC = [sublet, sublet.testing]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_lists_exactly_the_public_names(module: ModuleType) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert public == set(module.__all__)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_is_sorted_and_has_no_name_twice(module: ModuleType) -> None:
    names = sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert module.__all__ == list(dict.fromkeys(names))


def test_every_other_module_is_private() -> None:
    public_names = {module.__name__ for module in PUBLIC}
    modules = {info.name for info in pkgutil.walk_packages(sublet.__path__, "sublet.")}
    assert "sublet._worker.runner" in modules
    for name in modules - public_names:
        assert any(part.startswith("_") for part in name.split(".")), f"{name} looks public"


def _exceptions() -> list[type[BaseException]]:
    values = [getattr(module, name) for module in PUBLIC for name in module.__all__]
    return [value for value in values if isinstance(value, type) and issubclass(value, BaseException)]


@pytest.mark.parametrize("exception", _exceptions(), ids=lambda exception: exception.__name__)
def test_every_public_exception_is_a_sublet_error(exception: type[BaseException]) -> None:
    assert issubclass(exception, SubletError)


@pytest.mark.parametrize(
    ("exception", "base"),
    [
        (sublet.FailedTaskRunExceptionGroup, ValueError),
        (sublet.UnknownWorkflowError, ValueError),
        (sublet.RunCancelledError, ValueError),
        (sublet.RunNotFoundError, ValueError),
        (sublet.TransportUnavailable, ConnectionError),
    ],
)
def test_exceptions_keep_the_builtin_bases_that_programs_catch(
    exception: type[Exception], base: type[Exception]
) -> None:
    assert issubclass(exception, base)


def test_the_docstring_draws_every_exception() -> None:
    from sublet import _errors

    assert _errors.__doc__ is not None
    for exception in _exceptions():
        assert exception.__name__ in _errors.__doc__
