"""What a command line and its config files give by hand, as against defaults, which jsonargparse does not tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def given_options(argv: Sequence[str]) -> dict[str, Any]:
    """Options by name that a command line gives, "model" or "model.net", and of its config files model and data."""
    found: dict[str, Any] = {}
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if not word.startswith("-"):
            continue
        name, equals, attached = word.lstrip("-").partition("=")
        value = attached if equals else following
        if name in ("c", "config") and value is not None and Path(value).is_file():
            found |= _of_config(Path(value))
        else:
            found[name.replace(".init_args.", ".").removesuffix(".class_path")] = value
    return found


def _of_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a config in YAML, got {path}: {' '.join(str(error).split())}") from error
    found = {}
    for key in ("model", "data"):
        if isinstance(config, dict) and key in config:
            value = config[key]
            options = value if isinstance(value, dict) else {"class_path": value}
            if "class_path" in options:
                found[key] = options["class_path"]
            found |= {f"{key}.{name}": option for name, option in (options.get("init_args") or {}).items()}
    return found
