"""The folder of a study: the name of every file in it, how each is read and written, and whose folder it is.

Runs write it and reports read it, on floors that do not know each other, so this stands below both.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from lightning_modules.support.files import Rows, read_yaml, write_csv, write_yaml_once
from lightning_modules.support.import_paths import public_path
from lightning_modules.support.run_folder import RunFolder, make_folder, mapping, rows
from lightning_modules.support.whole_files import remove_left_overs

Stage = Literal["tune", "again", "study", "sweep"]
Document = Literal["config", "methods", "settled", "environment", "landscape"]
Table = Literal["results", "times", "summary", "tuning", "sweep", "target", "target-times", "deaths"]

_DOCUMENTS = get_args(Document)
_FOLDERS: dict[Stage, str] = {"tune": "tuning", "again": "tuning-again", "study": "runs", "sweep": "sweep"}


@dataclass(frozen=True)
class StudyFolder:
    """Every file of a study. What reads writes nothing, and finds nothing where there is no file.

    Attributes:
        path: Where it lies.
    """

    path: Path

    def file(self, name: Document | Table | Literal["report"]) -> Path:
        """The path of a file: options in YAML, tables in CSV, the report in HTML."""
        suffix = "html" if name == "report" else "yaml" if name in _DOCUMENTS else "csv"
        return self.path / f"{name}.{suffix}"

    def run(self, name: str) -> RunFolder:
        """The files of a run, by its name, as "runs/sgd-0"."""
        return RunFolder(self.path / name)

    def document(self, name: Document) -> dict[str, Any]:
        """Options by name; empty where there are none.

        Raises:
            ValueError: If the file is cut, or of another kind.
        """
        values = mapping(self.file(name))
        if name == "settled" and values and not {"settings", "target"} <= values.keys():
            raise ValueError(
                f"expected {self.file(name)} to hold settings and target, got {', '.join(values)}, as of a file "
                "that is cut; put it back as it was, or choose another folder with --out"
            )
        return values

    def table(self, name: Table) -> Rows:
        """Rows of a table; none where there is no such table."""
        return rows(self.file(name))

    def write_table(self, name: Table, rows: Rows) -> None:
        """Write a table; of no rows there is none."""
        if rows:
            write_csv(self.file(name), rows)
        else:
            self.file(name).unlink(missing_ok=True)

    @property
    def settled(self) -> bool:
        """Whether the settings that the runs train with are fixed."""
        return self.file("settled").exists()

    def settle(self, settings: Mapping[Any, Any], target: float | None) -> None:
        """Fix the settings of every method and the target; those that are there already stay."""
        write_yaml_once(self.file("settled"), {"settings": dict(settings), "target": target})

    def refresh_every(self, method: str) -> int | None:
        """Steps between two refreshes that a rehearsal of a method found; None before it."""
        every: int | None = mapping(self._rehearsal(method)).get("refresh_every")
        return every

    def keep_refresh_every(self, method: str, every: int) -> None:
        """Keep what a rehearsal found; of several processes the first one's stays."""
        write_yaml_once(self._rehearsal(method), {"refresh_every": every})

    def finalists(self, method: str) -> list[int]:
        """Trials of a method that run again, the best first; none before that is decided."""
        trials: list[int] = mapping(self._finalists(method)).get("trials", [])
        return trials

    def keep_finalists(self, method: str, trials: Iterable[int]) -> None:
        """Keep which trials run again; of several processes the first one's stay."""
        write_yaml_once(self._finalists(method), {"trials": list(trials)})

    def _finalists(self, method: str) -> Path:
        return self.path / "finalists" / f"{method}.yaml"

    def _rehearsal(self, method: str) -> Path:
        return self.path / "rehearsals" / f"{method}.yaml"

    def claim(
        self,
        documents: Mapping[Document, Mapping[str, Any]],
        *,
        packages: Iterable[str],
        unsaid: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        device: str = "cpu",
    ) -> None:
        """Make the folder a study's, or check that it is; environment.yaml tells the machine and the packages.

        Args:
            documents: Options by name, config among them, as plain values.
            packages: Names of those whose versions change the numbers.
            unsaid: By document, options that folders of before do not hold, with what they were then.
            device: What it is trained on. It stands for the option accelerator, which differs where "auto" found it.

        Raises:
            ValueError: If it cannot be a folder, or holds another study or other files; nothing is written then.
        """
        out = self.path
        versions = {name: version(name) for name in packages}
        there = _names_in(out)
        if there and self.file("config").name not in there:
            raise _no_study(out)
        for name, values in documents.items():
            if self.file(name).exists():
                _same(out, {**_flat(unsaid.get(name, {})), **_flat(read_yaml(self.file(name)))}, values)
        if self.file("environment").exists():
            environment = read_yaml(self.file("environment"))
            _same(out, environment.get("packages") or {}, versions)
            if (began := environment.get("device", "cpu")) != device:  # all were on the CPU before there was a choice
                raise ValueError(
                    f"{out} was begun on {began}, and this is {device}, where numbers and seconds differ; give "
                    f"--accelerator {'cpu' if began == 'cpu' else 'for that device'}, or another folder with --out"
                )
        make_folder(out)
        remove_left_overs(out)
        machine = {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "device": device,
            "packages": versions,
        }
        written: dict[Document, Mapping[str, Any]] = {**documents, "environment": machine}
        for name, values in written.items():
            if not self.file(name).exists():
                write_yaml_once(self.file(name), values)  # what starts at the same time claims it too
            if name in documents:  # or claimed it just now for another study, config before all else
                _same(out, {**_flat(unsaid.get(name, {})), **_flat(read_yaml(self.file(name)))}, values)


def run_name(stage: Stage, method: str, index: int) -> str:
    """The name of a run, which is the path of its files in the folder: "runs/sgd-0".

    Args:
        stage: What the run is for.
        method: Name of its method.
        index: Its trial, repeat, seed, or point of the sweep.
    """
    return f"{_FOLDERS[stage]}/{method}-{index}"


def check_series(out: Path, studies: Collection[str]) -> None:
    """Check that a folder is free for several studies, each in a folder of its own in it; nothing is written.

    Args:
        out: The folder.
        studies: Names of the folders in it.

    Raises:
        ValueError: If it cannot be a folder, or holds a study of its own or other files.
    """
    there = _names_in(out)
    if StudyFolder(out).file("config").name in there:
        raise _another_study(out)
    if there and not there & set(studies):
        raise _no_study(out)


def _names_in(out: Path) -> set[str]:
    """Names of the files in a folder, but for those that an interrupted process was writing; none where there is none.

    Raises:
        ValueError: If it cannot be a folder.
    """
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise ValueError(f"{out} is, or is inside, a file; choose a folder with --out")
    return {path.name for path in out.iterdir() if path.suffix != ".partial"} if out.exists() else set()


def _no_study(out: Path) -> ValueError:
    """The error to raise for a folder that holds something else."""
    return ValueError(f"{out} holds files but no study; choose an empty or a new folder with --out")


def _another_study(out: Path, changes: str = "") -> ValueError:
    return ValueError(f"{out} holds another study{changes}; choose another folder with --out, or remove it")


def _same(out: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    was, now = _flat(there), _flat(asked)
    names = [name for name in {**now, **was} if name != "accelerator"]
    changes = [f"{n} was {was.get(n)}, now {now.get(n)}" for n in names if was.get(n) != now.get(n)]
    if changes:
        raise _another_study(out, f": {'; '.join(changes)}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names; a class by its public path, since older folders have others."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = public_path(value) if name == "class_path" else value
    return flat
