"""What a model takes from its data on the command line, and the data that it has where none are given."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.data.characters import Characters
from lightning_modules.data.digits import Digits
from lightning_modules.models.classifier import Classifier
from lightning_modules.models.language import LanguageModel
from lightning_modules.support.import_paths import HOMES, public, public_path

# jsonargparse knows a class by its name alone once it is imported.
for _name in HOMES:
    public(_name)

OWN_DATA: dict[type, type] = {Classifier: Digits, LanguageModel: Characters}  # where no --data is given
FROM_DATA = ("input_shape", "num_classes", "vocabulary")


def own_model(given: Mapping[str, Any]) -> type | None:
    """The model of ours that the given options mean, if it is one; the classifier where none is named."""
    return next((kind for kind in OWN_DATA if is_called(kind, given.get("model") or "Classifier")), None)


def model_class(given: Mapping[str, Any]) -> type | None:
    """The class of the model that the given options mean; None where it cannot be imported."""
    try:
        model = own_model(given) or resolve_name(str(given["model"]))
    except (ImportError, AttributeError, ValueError):
        return None
    return model if isinstance(model, type) else None


def is_called(kind: type, name: str) -> bool:
    """Whether a name, or an import path, of now or of older files, is that of a class of ours."""
    return public_path(str(name)) in (kind.__name__, path_of(kind))


def path_of(kind: type) -> str:
    """The import path of a class of ours."""
    return f"lightning_modules.{kind.__name__}"


def link_to_data(parser: ArgumentParser, kind: type, given: Collection[str]) -> None:
    """Have a parser take what the data know from them.

    Args:
        parser: With the options "data" and "model".
        kind: Class of the model.
        given: Names of the options that are given by hand, as "model.num_classes".
    """
    for name in FROM_DATA:
        parameter = _parameter(kind, name)
        # A link takes the option away, so there is none where it is given by hand.
        if parameter is not None and f"model.{name}" not in given:
            target, compute = f"model.init_args.{name}", _FromData(name, parameter.default)
            parser.link_arguments("data", target, compute_fn=compute, apply_on="instantiate")


def _parameter(kind: type, name: str) -> inspect.Parameter | None:
    """A parameter of a class, also where it goes to a base as one of ``**kwargs``."""
    for base in kind.__mro__:
        parameters = inspect.signature(base).parameters
        if name in parameters or all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return parameters.get(name)
    return None


@dataclass(frozen=True)
class _FromData:
    """What the data know of an option; no local function, since ddp_spawn pickles the parser with its links."""

    name: str
    default: Any

    def __call__(self, data: Any) -> Any:
        if not hasattr(data, self.name) and self.default is inspect.Parameter.empty:
            raise ValueError(
                f"expected --model.{self.name}, as {type(data).__name__} has no {self.name}, got none; give it"
            )
        return getattr(data, self.name, self.default)
