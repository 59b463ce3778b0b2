"""Import paths of what files name: the public ones, and those of 0.1.0, which are accepted and never written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "lightning_modules"

HOMES = {  # public name -> module that it is defined in
    "AveragingExperiment": "callbacks.measurements.averaging",
    "BatchQuadratic": "callbacks.measurements.quadratic",
    "Characters": "data.characters",
    "Classifier": "models.classifier",
    "Digits": "data.digits",
    "HuggingFace": "data.hugging_face",
    "ImageData": "data.images",
    "Images": "data.images",
    "LanguageModel": "models.language",
    "Measurement": "callbacks.measurements.measurement",
    "ReadOuts": "callbacks.averages",
    "RefreshDirections": "callbacks.refresh",
    "SharpnessAware": "models.sharpness_aware",
    "SharpnessMonitor": "callbacks.measurements.sharpness",
    "ValleyWalk": "callbacks.measurements.valley",
    "WriteAverages": "callbacks.write_averages",
}

_MOVED = {  # module of 0.1.0 that study folders, configs or pickles name -> modules that now hold what it held
    "averages": ("callbacks.averages",),
    "callbacks": ("callbacks.measurements",),
    "callbacks.averaging": ("callbacks.measurements.averaging",),
    "callbacks.measurement": ("callbacks.measurements.measurement", "callbacks.measurements.budget"),
    "callbacks.quadratic": ("callbacks.measurements.quadratic",),
    "callbacks.sharpness": ("callbacks.measurements.sharpness",),
    "callbacks.valley": ("callbacks.measurements.valley",),
    "classifier": ("models.classifier",),
    "cli": ("commands.main",),  # the command of an editable install that was not installed again
    "data": ("data.images", "data.digits", "data.hugging_face", "data.batches"),
    "language": ("models.language", "data.characters"),
    "nets": ("models.nets.named", "models.nets.resnet"),
    "sharpness_aware": ("models.sharpness_aware",),
    "stages": ("models.base",),
    "transformers": ("models.nets.transformers",),
}


def public(name: str) -> Any:
    """The object of a public name, which is imported with the module that it is defined in."""
    return getattr(import_module(f"{_PACKAGE}.{HOMES[name]}"), name)


def public_path(path: str) -> str:
    """The path that files record of a class: of ours ``lightning_modules.NAME``, whichever module is named; else as is.

    Args:
        path: The import path of a class.
    """
    package, _, rest = path.partition(".")
    name = rest.rpartition(".")[2]
    return f"{_PACKAGE}.{name}" if package == _PACKAGE and name in HOMES else path


def moved(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module, by its name in the package, for the names that it had in 0.1.0."""
    return partial(_look_up, module)


def _look_up(module: str, name: str) -> Any:
    if not name.startswith("__"):  # tools that go through all modules ask for __file__ and the like
        for home in _MOVED[module]:
            new_module = import_module(f"{_PACKAGE}.{home}")
            if hasattr(new_module, name):
                return getattr(new_module, name)
    raise AttributeError(f"module '{_PACKAGE}.{module}' has no attribute {name!r}")


class _OldModules(MetaPathFinder, Loader):
    """Makes the modules of 0.1.0 that are gone, empty but for what they are asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and module in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = moved(module.__name__.partition(".")[2])  # type: ignore[method-assign]


sys.meta_path.append(_OldModules())  # the last one, for modules that no other finds
