"""The folder of a study: made for one configuration, and refused to any other."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.support.files import write_yaml
from lightning_modules.support.import_paths import public_path


def claim_folder(out: Path, files: Mapping[str, Mapping[str, Any]], *, packages: Iterable[str]) -> None:
    """Make a folder a study's, or check that it is; environment.yaml tells the machine and the packages.

    Args:
        out: The folder.
        files: File names, config.yaml among them, and the plain values that they hold.
        packages: Names of those whose versions change the numbers.

    Raises:
        ValueError: If it cannot be a folder, or holds another study or other files; nothing is written then.
    """
    versions = {name: version(name) for name in packages}
    environment = out / "environment.yaml"
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise ValueError(f"{out} is, or is inside, a file; choose a folder with --out")
    found = {path.name for path in out.iterdir() if path.suffix != ".partial"} if out.exists() else set()
    if found and "config.yaml" not in found:
        raise _no_study(out)
    for name, values in files.items():
        if (out / name).exists():
            _same(out, _read_mapping(out, out / name), values)
    if environment.exists():
        _same(out, _read_mapping(out, environment).get("packages", {}), versions)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}); choose another folder with --out") from error
    machine = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": versions,
    }
    for name, values in {**files, environment.name: machine}.items():
        if not (out / name).exists():  # runs that start at the same time claim it too
            write_yaml(out / name, values)


def _no_study(out: Path) -> ValueError:
    return ValueError(f"{out} holds files but no study; choose an empty or a new folder with --out")


def _read_mapping(out: Path, path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise _no_study(out)
    return found


def _same(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    was, now = _flat(found), _flat(wanted)
    changes = [f"{n} was {was.get(n)}, now {now.get(n)}" for n in {**now, **was} if was.get(n) != now.get(n)]
    if changes:
        raise ValueError(
            f"{out} holds another study: {'; '.join(changes)}; choose another folder with --out, or remove it"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names; a class by its public path, since older folders have others."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = public_path(value) if name == "class_path" else value
    return flat
