"""What the runs of a study train on: one device each, as Lightning finds it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.accelerators import AcceleratorRegistry

from lightning_modules.study.options import Precision
from lightning_modules.support.nearest import meant
from lightning_modules.support.quiet import quiet, quiet_trainer


@dataclass(frozen=True)
class Devices:
    """Devices that are alike, each of which several runs can share.

    Attributes:
        accelerator: What Lightning calls their kind: cpu, cuda, mps.
        name: What one is called, for example "NVIDIA H100 80GB HBM3"; "cpu" for the CPU.
        places: What is added to the environment of a process so that it sees one alone; one entry for each.
    """

    accelerator: str
    name: str
    places: tuple[Mapping[str, str], ...]


def find_devices(accelerator: str, precision: str) -> Devices:
    """The devices of this machine that runs can take.

    Args:
        accelerator: "auto", or what else Lightning's Trainer takes.
        precision: One of its precisions.

    Raises:
        ValueError: If there is no such accelerator or precision, or this machine does not have it.
    """
    kinds = AcceleratorRegistry.available_accelerators()
    for option, value, known in (
        ("accelerator", accelerator, ("auto", "gpu", *kinds)),
        ("precision", precision, get_args(Precision)),
    ):
        if value not in known:
            raise ValueError(f"expected {option} to be one of {', '.join(known)}, got {value!r}{meant(value, known)}")
    try:
        with quiet():
            device = quiet_trainer(accelerator=accelerator, devices=1).strategy.root_device
    except (MisconfigurationException, ImportError) as error:
        there = [kind for kind in kinds if AcceleratorRegistry[kind]["accelerator"].is_available()]
        raise ValueError(
            f"expected accelerator {accelerator} on this machine, got {', '.join(there)} alone; leave accelerator out "
            "for what there is, or see why torch does not find the device"
        ) from error
    _check_precision(precision, device)
    if device.type != "cuda":
        kind = device.type if device.type in kinds else accelerator
        return Devices(kind, device.type, ({},))
    # Others than the first would make other numbers, in other seconds.
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    alike = tuple({"CUDA_VISIBLE_DEVICES": _visible(i)} for i, name in enumerate(names) if name == names[0])
    return Devices("cuda", names[0], alike)


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "16-mixed" and device.type == "cpu":  # where Lightning would take bf16-mixed
        raise ValueError("expected a precision that the CPU has, got 16-mixed; take bf16-mixed, or another accelerator")
    try:
        with quiet():
            quiet_trainer(accelerator=device.type, devices=1, precision=precision)
    except ImportError as error:
        raise ValueError(
            f"expected precision {precision} to come with the package that it needs, got none: "
            f"{' '.join(str(error).split())}"
        ) from error


def _visible(index: int) -> str:
    """What CUDA calls a device of those that this process sees: a number, or as given a name."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(index) if given is None else given.split(",")[index].strip()
