"""The tables of a study, gathered from what its runs wrote."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_modules.study.options import Study
from lightning_modules.study.runs.plan import Run, tuning_rows
from lightning_modules.study.statistics import summarise, times_to_target
from lightning_modules.support.files import Rows
from lightning_modules.support.run_folder import RunFolder
from lightning_modules.support.study_folder import StudyFolder


def write_tables(study: Study, folder: StudyFolder, plan: Sequence[Run]) -> list[str]:
    """Gather what the runs wrote; seconds stand apart, so that results.csv is the same whenever it is made.

    Args:
        study: The study, whose settings are settled.
        folder: Its folder.
        plan: Its runs.

    Returns:
        Names of the runs that died.

    Raises:
        ValueError: If no run of the study survived.
    """
    rows: Rows = []
    times: Rows = []
    names = list(study.recipes)
    metrics: dict[str, dict[int, Rows]] = {method: {} for method in study.recipes}
    finished = [run for run in plan if folder.run(run.name).finished]
    counted = [run for run in finished if run.stage == "study"]
    for run in sorted(counted, key=lambda run: (run.seed, names.index(run.method))):
        files = folder.run(run.name)
        rows += _with_start(files)
        metrics[run.method][run.seed] = steps = files.steps()
        times.append({"method": run.method, "seed": run.seed, "seconds": steps[-1]["seconds"]})
    died = [run for run in plan if run not in finished and folder.run(run.name).died]
    if not rows:
        raise ValueError(f"no run of the study survived; see {folder.run(died[0].name).failure}")
    folder.write_table("results", rows)
    folder.write_table("times", times)
    folder.write_table("summary", summarise(rows, names, study.score.measures(rows[0]), range(study.seeds)))
    folder.write_table("deaths", [{"run": run.name, "method": run.method, "seed": run.seed} for run in died])
    folder.write_table("tuning", tuning_rows(study, folder))
    target = folder.document("settled")["target"]
    if target is not None:
        reached = times_to_target(metrics, range(study.seeds), target, study.score)
        folder.write_table("target", [{n: v for n, v in row.items() if n != "seconds"} for row in reached])
        folder.write_table("target-times", [{n: row[n] for n in ("method", "seed", "seconds")} for row in reached])
    swept = [row for run in finished if run.stage == "sweep" for row in _with_start(folder.run(run.name))]
    folder.write_table("sweep", swept)
    return [run.name for run in died]


def _with_start(files: RunFolder) -> Rows:
    """Results of a run, with the loss of the first batch, before the first step."""
    start = float(files.steps()[0]["loss"])
    return [{**row, "start_loss": start} for row in files.results()]
