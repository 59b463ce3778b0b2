"""Rooms stand on floors: a module imports from its own room and from those below, and no imports run in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_modules
import nsgd

FLOORS = {  # from the ground; rooms of one floor know nothing of each other
    "nsgd": ("curvature", "trajectory", "options", "directions", "damping", "optimizer"),
    "lightning_modules": ("support", ("data", "models"), "callbacks", "study", "report", "commands"),
}
ROOTS = {package.__name__: Path(package.__file__).parent for package in (nsgd, lightning_modules)}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics"}


@cache
def imported(source):
    """What a module imports when it runs, wherever in it; not what is for type checkers alone."""
    tree = ast.parse(source)
    unused = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    found = set()
    for node in ast.walk(tree):
        if node in unused:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected absolute imports"
            # A name may be a module of a package, or of what a module holds.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def of(package, names):
    """The modules of a package among imported names."""
    return {name for name in names if name == package or name.startswith(f"{package}.")}


@cache
def sources():
    """Each module of both packages by its name, with its text."""
    found = {}
    for root in ROOTS.values():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return found


def module_of(name):
    return name if name in sources() else name.rpartition(".")[0]


def modules(package):
    """Each module of a package by its name, with the modules of the package that it imports."""
    return {
        name: {module_of(other) for other in of(package, imported(source))}
        for name, source in sources().items()
        if of(package, [name])
    }


def room_of(module):
    return ".".join(module.split(".")[:2])


def upward(module, others):
    """Those of the imported modules that lie above or beside, or are none of the floors'."""
    package, room = module.split(".")[:2]
    floors = [(floor,) if isinstance(floor, str) else floor for floor in FLOORS[package]]
    own = next(number for number, floor in enumerate(floors) if room in floor)
    below = {f"{package}.{name}" for floor in floors[:own] for name in floor} | {f"{package}.{room}"}
    return sorted(other for other in others if room_of(other) not in below)


def reached(start):
    """Everything that importing some modules imports, of any package, the packages that hold them included."""
    found, left = set(), list(start)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        name = module_of(name)
        parts = name.split(".")
        left += [".".join(parts[:number]) for number in range(1, len(parts))]
        if name in sources():
            left += imported(sources()[name])
    return {module_of(name) if name.split(".")[0] in ROOTS else name for name in found}


def rooms(package):
    return {room for floor in FLOORS[package] for room in ([floor] if isinstance(floor, str) else floor)}


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_runs_upwards(package):
    found = modules(package)
    outside = {package, f"{package}.__main__"}
    assert {name.split(".")[1] for name in found.keys() - outside} == rooms(package)
    wrong = {name: upward(name, others) for name, others in found.items() if name not in outside}
    assert {name: others for name, others in wrong.items() if others} == {}


@pytest.mark.parametrize(
    ("package", "order"),
    [
        ("nsgd", ("curvature.guard", "optimizer")),
        ("lightning_modules", ("support.files", "data.images", "study.options", "commands.main")),
    ],
)
def test_no_imports_run_in_a_circle(package, order):
    found = list(TopologicalSorter(modules(package)).static_order())
    places = [found.index(f"{package}.{name}") for name in order]
    assert places == sorted(places)


def test_nsgd_knows_neither_lightning_nor_its_modules():
    tops = {name.split(".")[0] for name in reached(modules("nsgd"))}
    assert {"torch", "nsgd"} <= tops
    assert not tops & (LIGHTNING | {"lightning_modules"})


def test_a_report_needs_neither_lightning_nor_a_study():
    found = reached(name for name in modules("lightning_modules") if room_of(name) == "lightning_modules.report")
    assert {"lightning_modules.report.page", "lightning_modules.support.files", "matplotlib"} <= found
    assert not {name.split(".")[0] for name in found} & LIGHTNING
    assert {room_of(name) for name in of("lightning_modules", found)} == {
        "lightning_modules",
        *(f"lightning_modules.{room}" for room in ("support", "report")),
    }


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nsgd.directions.samples", "from nsgd.damping.step import Damped"),
        ("nsgd.directions.samples", "from nsgd.damping import step"),
        ("nsgd.directions.samples", "import nsgd.damping.step"),
        ("nsgd.directions.samples", "def late():\n    from nsgd.damping import step"),
        ("nsgd.directions.samples", "from nsgd import damp"),  # the package itself is above all floors
        ("lightning_modules.study.options", "from lightning_modules.commands import main"),
        ("lightning_modules.study.options", "from lightning_modules import Classifier"),
        ("lightning_modules.models.batch_loss", "from lightning_modules.data.cutting import some_samples"),
        ("lightning_modules.data.images", "from lightning_modules.models.base import Split"),
    ],
)
def test_an_upward_import_is_seen(module, line):
    package = module.split(".")[0]
    assert len(upward(module, of(package, imported(line)))) == 1
    assert upward(module, [f"{package}.{FLOORS[package][0]}.any", room_of(module)]) == []


def test_a_circle_is_seen():
    found = modules("nsgd")
    found["nsgd.curvature.guard"].add("nsgd.curvature.eigen")
    with pytest.raises(CycleError):
        list(TopologicalSorter(found).static_order())


def test_lightning_is_seen_through_other_modules():
    assert "pytorch_lightning" in {name.split(".")[0] for name in reached(["lightning_modules.study.runs.evaluate"])}
    assert "pytorch_lightning" in {name.split(".")[0] for name in reached(["lightning_modules.study.tuning"])}
