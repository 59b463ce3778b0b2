"""Colours and lines of figures: of measurements, and of the methods of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito
GREY = "#777777"

Line = str | tuple[float, tuple[float, ...]]  # a line style of matplotlib's

# Lines that tell apart without colour, for methods whose own line is taken.
_LINES: tuple[Line, ...] = (
    *("-", "--", "-.", ":"),
    *((0, (6, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4))),
    *((0, (8, 2, 2, 2)), (0, (2, 2)), (0, (12, 2, 1, 2, 1, 2)), (0, (5, 5)), (0, (10, 1)), (0, (3, 5, 1, 5))),
    *((0, (6, 1, 1, 1, 1, 1, 1, 1)), (0, (2, 5)), (0, (14, 4)), (0, (8, 1, 3, 1))),
)


@dataclass(frozen=True)
class MethodStyle:
    """How a method is called and drawn, and what it is in a comparison.

    Attributes:
        label: Its name in print.
        color: Of its lines.
        line: Their style.
        control: Whether it stands for what something other than the curvature gives.
        damps: Whether it steps less along the sharpest directions.
        schedule: What its learning rate does; empty where that was not kept.
        damping: Options of the rule that it has whatever the study's are; none without directions.
        equals: The method of which, and the read-out that, its last weights are predicted to be; none of most.
    """

    label: str
    color: str
    line: Line = "-"
    control: bool = False
    damps: bool = False
    schedule: str = ""
    damping: Mapping[str, Any] | None = None
    equals: Mapping[str, str] | None = None


_KEPT = tuple(field.name for field in fields(MethodStyle))  # of what a study says of a method

# Of the methods of studies that were made before a study kept these itself.
EARLIER = {
    "sgd": MethodStyle("SGD", "#444444"),
    "sgd-momentum": MethodStyle("SGD with momentum", "#444444", "--"),
    "sgd-more": MethodStyle("SGD given NSGD's gradients", "#cc79a7", control=True),
    "sgd-momentum-more": MethodStyle("momentum SGD given NSGD's gradients", "#cc79a7", "--", control=True),
    "nsgd": MethodStyle("NSGD", "#0072b2", damps=True, damping={}),
    "nsgd-momentum": MethodStyle("NSGD with momentum", "#0072b2", "--", damps=True, damping={}),
    "nsgd-hessian": MethodStyle(
        "NSGD by Hessian eigenvectors", "#0072b2", "-.", damps=True, damping={"solver": "lanczos", "decay": None}
    ),
    "bulk-sgd": MethodStyle("Bulk-SGD", "#d55e00", "--", damps=True, damping={"gamma": 0.0, "bulk_scale": 1.0}),
    "dom-sgd": MethodStyle("Dom-SGD", "#009e73", "-.", control=True, damping={"gamma": 1.0, "bulk_scale": 0.0}),
    "random": MethodStyle(
        "random directions", "#999999", ":", control=True, damping={"solver": "random", "decay": None}
    ),
    "adamw": MethodStyle("AdamW", "#009e73"),
    "damped-adamw": MethodStyle("damped AdamW", "#56b4e9", damps=True, damping={}),
    "sam": MethodStyle("SAM", "#e69f00"),
}


def method_styles(methods: Iterable[str], written: Mapping[str, Mapping[str, Any]]) -> dict[str, MethodStyle]:
    """The style of each method of a study, no two of them with one line.

    Args:
        methods: Names, in the order of the study.
        written: What the study says of its methods; empty where it is of before it did.

    Raises:
        ValueError: If a method is neither there nor one of those that there were before.
    """
    styles: dict[str, MethodStyle] = {}
    for method in methods:
        style = (
            MethodStyle(**{name: said[name] for name in _KEPT if name in said})
            if (said := _described(method, written))
            else EARLIER.get(method)
        )
        if style is None:
            raise ValueError(
                f"expected methods.yaml to say how {method!r} is drawn, got {', '.join(written) or 'none'}"
            )
        line = _line(style.line)
        taken = {other.line for other in styles.values()}
        if line in taken:
            line = next((free for free in _LINES if free not in taken), line)
        styles[method] = replace(style, line=line)
    return styles


def _described(method: str, written: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a study says of a method; empty where it does not. The options of the rule came last."""
    if method not in written:
        return {}
    return {"damping": EARLIER[method].damping if method in EARLIER else None, **written[method]}


def _line(line: Any) -> Line:
    """A line as a file has it, whose dashes are lists."""
    return line if isinstance(line, str) else (line[0], tuple(line[1]))
