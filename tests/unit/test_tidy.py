"""Checks the source text itself: layers, dependencies, sizes, unused definitions, repeated constants and words.

Each test lists what is wrong as ``file:line: what: the cure``.
"""

from __future__ import annotations

import ast
import functools
import gc
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sublet
import sublet.testing

ROOT = Path(__file__).parents[2]

FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 600

SERVICES = ("sublet_scheduler", "sublet_timer", "sublet_event_ingest", "sublet_worker")
TESTING_ONLY = ("sublet_engine", "sublet_platform", "sublet_scheduler", "sublet_timer", "sublet_event_ingest")

LAYERS: dict[str, tuple[str, ...]] = {
    "sublet_protocol": (),
    "sublet_engine": ("sublet_protocol",),
    "sublet_platform": ("sublet_engine", "sublet_protocol"),
    "sublet": ("sublet_protocol",),
    "sublet.testing": ("sublet", "sublet_protocol", *TESTING_ONLY),
    "sublet_scheduler": ("sublet_engine", "sublet_platform", "sublet_protocol"),
    "sublet_timer": ("sublet_engine", "sublet_platform", "sublet_protocol"),
    "sublet_event_ingest": ("sublet_engine", "sublet_platform", "sublet_protocol"),
    "sublet_worker": ("sublet", "sublet_platform", "sublet_protocol"),
}
"""Which of our packages each package may import."""

DRIVERS: dict[str, tuple[str, ...]] = {
    "motor": ("sublet_platform.mongo.client",),
    "pymongo": ("sublet_platform.mongo.client",),
    "bson": ("sublet_platform.mongo.client",),
    "aio_pika": ("sublet_platform.rabbit", "sublet._amqp"),
    "aiormq": ("sublet_platform.rabbit", "sublet._amqp"),
    "pamqp": ("sublet_platform.rabbit", "sublet._amqp"),
    "pydantic": ("sublet", "sublet_platform", *SERVICES),
    "prometheus_client": ("sublet_platform", *SERVICES),
    "faststream": ("sublet_platform", *SERVICES),
    "uvicorn": ("sublet_platform", *SERVICES),
}
"""Which of our packages or modules may import a library."""

DISTRIBUTIONS = {"bson": "pymongo", "pydantic_core": "pydantic"}
"""Where the distribution that provides a module has another name than the module."""


@dataclass(frozen=True)
class Module:
    path: Path
    name: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def at(self, line: int, what: str) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}: {what}"


def _parsed(text: str) -> ast.Module:
    """Parse without garbage collection. In Python 3.11 `ast.parse` raises SystemError if it is entered again meanwhile,
    which happens when a collected coroutine of another test prints a traceback."""
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        gc.enable()


@functools.cache
def modules() -> list[Module]:
    """The modules of all packages in libs and services."""
    paths = [path for folder in ("libs", "services") for path in sorted(ROOT.glob(f"{folder}/*/src/**/*.py"))]
    return [_module(path, path.relative_to(next(p for p in path.parents if p.name == "src"))) for path in paths]


def _module(path: Path, relative: Path) -> Module:
    text = path.read_text()
    parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
    return Module(path, ".".join(parts), text, _parsed(text))


def _imports(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, module.at(node.lineno, "relative import: import by the full name")
            yield node.lineno, node.module


def _is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _assert_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# --- layers and dependencies --------------------------------------------------------------------------------------


def test_packages_import_only_the_layers_below() -> None:
    problems = []
    for module in modules():
        layer = "sublet.testing" if module.name.startswith("sublet.testing") else module.package
        allowed = (module.package, *LAYERS[layer])
        for line, name in _imports(module):
            package = name.partition(".")[0]
            if package in LAYERS and package not in allowed:
                cure = "move the code, or pass what it needs as an argument"
                problems.append(module.at(line, f"{layer} must not import {name}: {cure}"))
            elif name.startswith("sublet.testing") and layer != "sublet.testing":
                problems.append(module.at(line, f"{layer} must not import {name}: it is for the tests of users"))
    _assert_none(problems)


def test_only_the_adapters_import_drivers() -> None:
    problems = [
        module.at(line, f"{module.name} imports {name}: only {' and '.join(DRIVERS[library])} may; use the ports")
        for module in modules()
        for line, name in _imports(module)
        if (library := name.partition(".")[0]) in DRIVERS and not _is_in(module.name, DRIVERS[library])
    ]
    _assert_none(problems)


def test_dependencies_match_the_imports() -> None:
    problems = []
    for file in sorted([*ROOT.glob("libs/*/pyproject.toml"), *ROOT.glob("services/*/pyproject.toml")]):
        project = tomllib.loads(file.read_text())["project"]
        used: set[str] = set()
        used_for_tests: set[str] = set()
        for module in modules():
            if file.parent in module.path.parents:
                into = used_for_tests if module.name.startswith("sublet.testing") else used
                into |= {_distribution(name) for _, name in _imports(module)}
        own = {project["name"]} | set(map(_distribution, sys.stdlib_module_names))
        declared = set(map(_requirement, project["dependencies"]))
        extra = set(map(_requirement, project.get("optional-dependencies", {}).get("testing", [])))
        where = file.relative_to(ROOT)
        problems += [f"{where}:1: {name} is imported: declare it" for name in sorted(used - own - declared)]
        problems += [f"{where}:1: {name} is declared but not imported: drop it" for name in sorted(declared - used)]
        missing = used_for_tests - own - declared - extra
        problems += [f"{where}:1: {name} is imported: declare it in the extra `testing`" for name in sorted(missing)]
        unused = extra - used_for_tests
        problems += [f"{where}:1: {name} is not imported: drop it from the extra" for name in sorted(unused)]
    _assert_none(problems)


def _distribution(module: str) -> str:
    top = module.partition(".")[0]
    return DISTRIBUTIONS.get(top, top).replace("_", "-")


def _requirement(text: str) -> str:
    match = re.match(r"[\w-]+", text)
    assert match is not None, text
    return match[0]


# --- sizes --------------------------------------------------------------------------------------------------------


def test_functions_are_short() -> None:
    problems = []
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
                if lines > FUNCTION_LINES_MAX:
                    what = f"{node.name} has {lines} lines: split it, {FUNCTION_LINES_MAX} are allowed"
                    problems.append(module.at(node.lineno, what))
    _assert_none(problems)


def _docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return (first.end_lineno or 0) - first.lineno + 1
    return 0


def test_modules_are_short() -> None:
    counts = [(module, len(module.text.splitlines())) for module in modules()]
    _assert_none(
        [
            module.at(1, f"the module has {count} lines: split it by topic, {MODULE_LINES_MAX} are allowed")
            for module, count in counts
            if count > MODULE_LINES_MAX
        ]
    )


# --- unused definitions -------------------------------------------------------------------------------------------

PUBLIC_CLASSES = {*sublet.__all__, *sublet.testing.__all__, "RunsClient", "BaseWorkflow"}
"""Users call the methods of these; ``RunsClient`` is ``Sublet.runs``, ``BaseWorkflow`` the base of workflows."""

CALLED_FROM_OUTSIDE = {
    "main": "the entry point of a service",
    "capture_signals": "uvicorn",
    "collect": "prometheus_client",
    "call_at": "asyncio",
    "_call_soon": "asyncio",
}
"""Definitions that a framework calls by name, with the caller."""

# Only tests name these. Delete what can move to the tests, and empty this.
USED_BY_TESTS_ONLY = {"enqueued", "counted", "server_status", "SettingsStore"}


def test_definitions_are_used() -> None:
    allowed = _used_names() | PUBLIC_CLASSES | set(CALLED_FROM_OUTSIDE) | USED_BY_TESTS_ONLY
    problems = [
        module.at(line, f"nothing names {name}: delete it, or move it to the tests")
        for module in modules()
        for name, line, owner in _definitions(module.tree)
        if name not in allowed and owner not in PUBLIC_CLASSES and not name.startswith("__")
    ]
    _assert_none(problems)


def _used_names() -> set[str]:
    """All names that code in libs, services and deploy refers to; strings count, as `getattr` and metrics use them."""
    trees = [module.tree for module in modules()]
    trees += [_parsed(path.read_text()) for path in sorted(ROOT.glob("deploy/**/*.py"))]
    trees += [_parsed(path.read_text()) for path in sorted(ROOT.glob("libs/sublet/examples/*.py"))]
    used: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name, ctx=ast.Load()):
                    used.add(name)
                case ast.Constant(value=str(text)) if text.isidentifier():
                    used.add(text)
                case ast.keyword(arg=str(name)):
                    used.add(name)
                case _:
                    pass
    return used


def _definitions(tree: ast.Module) -> Iterator[tuple[str, int, str | None]]:
    """Name, line and class of each module-level definition and each method."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno, None
            case ast.ClassDef(name=name):
                yield name, node.lineno, None
                for item in node.body:
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield item.name, item.lineno, name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node.lineno, None
            case _:
                pass


# --- constants ----------------------------------------------------------------------------------------------------

TOPOLOGY = "sublet_protocol.topology"


def test_a_constant_has_one_value() -> None:
    found: defaultdict[str, list[tuple[Module, int, str]]] = defaultdict(list)
    for module in modules():
        for name, line, value in _constants(module.tree):
            found[name].append((module, line, value))
    problems = [
        module.at(line, f"{name} is {value} here, and has another value elsewhere: rename one")
        for name, uses in found.items()
        if len({value for _, _, value in uses}) > 1
        for module, line, value in uses
    ]
    _assert_none(problems)


def _constants(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Public constants with a literal value: name, line and value."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)) if re.match("[A-Z]", name):
                yield name, node.lineno, repr(value)
            case _:
                pass


def test_names_of_exchanges_and_queues_are_in_topology_only() -> None:
    (topology,) = [module for module in modules() if module.name == TOPOLOGY]
    names = {
        node.value
        for node in ast.walk(topology.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sublet.")
    }
    problems = [
        module.at(node.lineno, f"{node.value!r} is a name of {TOPOLOGY}: import it from there")
        for module in modules()
        if module is not topology
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert names
    _assert_none(problems)


# --- words --------------------------------------------------------------------------------------------------------

RETIRED_WORDS = {
    r"whoever": "name the person or the part",
    r"for ever": "without end",
    r"in good order": "name the state",
    r"what is over": "name the thing that has ended",
    r"who lives": "live workers",
    r"of its own accord": "by itself",
    r"carry on|begun again": "resume, replay or restart",
    r"strikes?|blows?": "expire (deadlines), fault (tests)",
    r"turmoil": "chaos",
    r"narrowness": "tiny limits",
    r"troubles": "failures",
    r"voyages?": "run",
    r"crew": "workers",
    r"findings?": "anomaly",
    r"(?<!type[ _])hints?": "unconfirmed message",
    r"parked": "retained (tickets)",
    r"suspend(s|ed)?": "evict",
    r"giv(e|es|en|ing)[ _]back": "requeue",
    r"epoch seconds": "Unix seconds",
    r"hash slots?": "bucket",
}
"""Words that the glossary (libs/engine/GLOSSARY.md) does not use any more, as patterns, with the replacement."""


def test_retired_words_are_not_used() -> None:
    problems = []
    for path in _texts():
        where = path.relative_to(ROOT).as_posix()
        problems += [f"{where}:{line}: {what}" for line, what in _retired_words(path.read_text())]
    _assert_none(problems)


def _texts() -> list[Path]:
    """All Python files and pages of the project, but for this file, which has to name the words."""
    paths = [path for kind in ("py", "md") for path in ROOT.glob(f"*.{kind}")]
    for folder in (".ci", ".github", "deploy", "libs", "services", "tests"):
        paths += [path for kind in ("py", "md") for path in ROOT.glob(f"{folder}/**/*.{kind}")]
    return sorted(path for path in paths if path != Path(__file__) and ".venv" not in path.parts)


def _retired_words(text: str) -> Iterator[tuple[int, str]]:
    """A word ends at an underscore too: names of functions and variables are read as words."""
    for number, line in enumerate(text.splitlines(), 1):
        for word, cure in _PATTERNS:
            if (match := word.search(line)) is not None:
                yield number, f"{match[0]!r} is retired: {cure}"


_PATTERNS = [
    (re.compile(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", re.IGNORECASE), cure) for word, cure in RETIRED_WORDS.items()
]


def test_the_rule_for_words_finds_a_retired_word() -> None:
    assert [line for line, _ in _retired_words("a\ndef crew_of(): ...\nget_type_hints()\na Blow")] == [2, 4]
