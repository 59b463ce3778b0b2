"""What a command line and its config files give by hand, as against defaults, which jsonargparse does not tell."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml


def given_options(argv: Sequence[str], *, of_files: Collection[str] = ("model", "data")) -> dict[str, Any]:
    """Options by name that a command line and its config files give, "model" or "model.net".

    Args:
        argv: The words of the command line.
        of_files: First parts of the names that count in config files; empty for all.

    Raises:
        ValueError: If a config file is no YAML, or no mapping, or names another one.
    """
    options: dict[str, Any] = {}
    for word, following in zip_longest(argv, argv[1:]):
        if not word.startswith("-"):
            continue
        name, equals, attached = word.lstrip("-").partition("=")
        value = attached if equals else following
        if name in ("c", "config") and value is not None and os.path.isfile(value):
            config = _flat(_read(Path(value)))
            options |= {key: of for key, of in config.items() if not of_files or key.partition(".")[0] in of_files}
        else:
            options[name.rstrip("+").replace(".init_args.", ".").removesuffix(".class_path")] = value
    return options


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a config in YAML, got {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        what = "which is empty" if config is None else f"a {type(config).__name__}"
        raise ValueError(f"expected a config of options, a line NAME: VALUE for each, got {path}, {what}; write some")
    if config.get("config") is not None:
        raise ValueError(f"expected options in the config {path}, got another config in it; write its options there")
    return config


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options under dotted names, those of a class under the option that names it."""
    options: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}".rstrip("+")
        if not isinstance(value, dict):
            options[key] = value
        elif "class_path" in value or "init_args" in value:
            options |= {key: value["class_path"]} if "class_path" in value else {}
            options |= _flat(value.get("init_args") or {}, f"{key}.")
        else:
            options |= {key: value} | _flat(value, f"{key}.")
    return options
