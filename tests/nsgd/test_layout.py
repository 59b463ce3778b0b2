"""Rooms stand on floors: a module imports from its own room and from those below, and no imports run in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nsgd

FLOORS = ("curvature", "trajectory", "options", "directions", "damping", "optimizer")  # from the ground
ROOT = Path(nsgd.__file__).parent


def imported(source):
    """The modules of nsgd that a module imports when it runs, wherever in it; not what is for type checkers alone."""
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
    return {name for name in found if name == "nsgd" or name.startswith("nsgd.")}


def modules():
    """Each module of nsgd by its name, with the modules that it imports."""
    sources = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        sources[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")

    def module_of(name):
        return name if name in sources else name.rpartition(".")[0]

    return {name: {module_of(other) for other in imported(source)} for name, source in sources.items()}


def upward(module, others):
    """Those of the imported modules that lie above, or are none of the floors'."""
    room = FLOORS.index(module.split(".")[1])
    below = {f"nsgd.{name}" for name in FLOORS[: room + 1]}
    return sorted(other for other in others if ".".join(other.split(".")[:2]) not in below)


def test_no_import_runs_upwards():
    found = modules()
    assert {name.split(".")[1] for name in found if name != "nsgd"} == set(FLOORS)
    wrong = {name: upward(name, others) for name, others in found.items() if name != "nsgd"}
    assert {name: others for name, others in wrong.items() if others} == {}


def test_no_imports_run_in_a_circle():
    found = modules()
    order = list(TopologicalSorter(found).static_order())
    assert order.index("nsgd.curvature.guard") < order.index("nsgd.optimizer") < order.index("nsgd")


@pytest.mark.parametrize(
    "line",
    [
        "from nsgd.damping.step import Damped",
        "from nsgd.damping import step",
        "import nsgd.damping.step",
        "def late():\n    from nsgd.damping import step",
        "from nsgd import damp",  # the package itself is above all floors
    ],
)
def test_an_upward_import_is_seen(line):
    assert len(upward("nsgd.directions.samples", imported(line))) == 1
    assert upward("nsgd.directions.samples", imported("from nsgd.curvature.hessian import loss_hessian")) == []


def test_a_circle_is_seen():
    found = modules()
    found["nsgd.curvature.guard"].add("nsgd.curvature.eigen")
    with pytest.raises(CycleError):
        list(TopologicalSorter(found).static_order())
