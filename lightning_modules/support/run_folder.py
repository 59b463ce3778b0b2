"""The folder of one run of a study: its files, how each is read and written, and what shows that one is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_modules.support.files import Rows, read_csv, read_yaml, write_csv, write_yaml
from lightning_modules.support.whole_files import CannotWrite, no_room, write_text

_RUN, _COUNTS = "run.yaml", "rows"  # settings of a run, and under which name the numbers of its rows
_ONE_BY_ONE = "samples_one_by_one"  # and that gradients of samples were taken so


@dataclass(frozen=True)
class RunFolder:
    """The files of one run of a study.

    Attributes:
        path: Where it lies.
    """

    path: Path

    @property
    def failure(self) -> Path:
        """File of what a run that died had to say."""
        return self.path / "failed.txt"

    @property
    def checkpoint(self) -> Path:
        """File that an interrupted run goes on from."""
        return self.path / "checkpoint.ckpt"

    @property
    def finished(self) -> bool:
        """Whether there are results, which are written last.

        Raises:
            ValueError: If they are cut.
        """
        return len(self.results()) > 0

    @property
    def died(self) -> bool:
        """Whether the run was tried in vain."""
        return self.failure.exists()

    def begin(self, settings: Mapping[str, Any], *, measurements: Iterable[str] = ()) -> None:
        """Make the folder, take away what an interrupted run left, and write the settings of this one.

        Args:
            settings: What the run trains with.
            measurements: Names of the tables that a run may measure.

        Raises:
            ValueError: If it cannot be a folder.
        """
        make_folder(self.path)
        for path in (*(self.path / f"{name}.csv" for name in measurements), self.failure):
            path.unlink(missing_ok=True)
        write_yaml(self.path / _RUN, settings)

    def end(self, steps: Rows, results: Rows, *, one_by_one: bool = False) -> None:
        """Write the rows of its steps, how many rows there are, and last its results.

        Args:
            steps: One row for each optimizer step.
            results: One row for each read-out.
            one_by_one: Whether gradients of samples were taken one by one, which is slower; noted where it is so.
        """
        write_csv(self.path / "metrics.csv", steps)
        noted = {_ONE_BY_ONE: True} if one_by_one else {}
        counts = {_COUNTS: {"metrics": len(steps), "results": len(results)}}
        write_yaml(self.path / _RUN, {**self.settings(), **noted, **counts})
        write_csv(self.path / "results.csv", results)
        self.checkpoint.unlink(missing_ok=True)

    def fail(self, words: str) -> None:
        """Write down why the run died."""
        make_folder(self.path)
        self.checkpoint.unlink(missing_ok=True)
        write_text(self.failure, words)

    def settings(self) -> dict[str, Any]:
        """Settings that the run trained with; empty where it never began."""
        return {name: value for name, value in self._described().items() if name not in (_COUNTS, _ONE_BY_ONE)}

    @property
    def one_by_one(self) -> bool:
        """Whether the run took gradients of samples one by one."""
        return self._described().get(_ONE_BY_ONE) is True

    def steps(self) -> Rows:
        """One row for each optimizer step; none where they were not kept."""
        return self._rows("metrics")

    def results(self) -> Rows:
        """One row for each read-out; none before the run has ended."""
        return self._rows("results")

    def _rows(self, name: Literal["metrics", "results"]) -> Rows:
        path = self.path / f"{name}.csv"
        with self._told_how_to_mend():
            found = rows(path)
        # Folders of before do not say how many there are; without any, the run has not ended.
        if found and len(found) != (wanted := (self._described().get(_COUNTS) or {}).get(name, len(found))):
            raise ValueError(
                f"expected {wanted} rows in {path}, got {len(found)}, as of a file that is cut; put it back as it was, "
                f"{self._again}"
            )
        return found

    def _described(self) -> dict[str, Any]:
        with self._told_how_to_mend():
            return mapping(self.path / _RUN)

    @contextmanager
    def _told_how_to_mend(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{error}, {self._again}") from error

    @property
    def _again(self) -> str:
        return f"or remove {self.path}, and the same command makes that run again"


def make_folder(folder: Path) -> None:
    """Make a folder of a study.

    Raises:
        ValueError: If it cannot be one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if no_room(error):
            raise
        cause = error
        if not isinstance(error, FileExistsError | NotADirectoryError):  # which stand in the way of one folder alone
            cause = CannotWrite(error.errno, error.strerror, str(folder))
        raise ValueError(f"{folder} cannot be made ({error.strerror}); choose another folder with --out") from cause


def mapping(path: Path) -> dict[str, Any]:
    """Options of a file by name; empty where there is none."""
    return read_yaml(path) if path.exists() else {}


def rows(path: Path) -> Rows:
    """Rows of a table; none where there is no such table."""
    return read_csv(path) if path.exists() else []
