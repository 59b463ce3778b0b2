"""Commands in processes of their own: on this machine, several at a time, or as tasks of a Ray cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

Launcher = Literal["local", "ray"]
Command = Sequence[str]
OnLine = Callable[[int, str], None]  # number of the command, a line that it printed

_LAST_WORDS = 4000  # characters of what a command that died had printed


def launch(
    commands: Mapping[int, Command], *, launcher: Launcher, jobs: int, threads: int, on_line: OnLine
) -> Iterator[tuple[int, str | None]]:
    """Run commands, and yield the number of each as it ends, with what it said if it died.

    Args:
        commands: By number.
        launcher: "local" for processes here; "ray" for tasks of the cluster that Ray finds, or of one that it starts
            here. Its machines need this environment and the same folders.
        jobs: Processes at a time; Ray decides for itself.
        threads: Cores that each takes, for Ray.
        on_line: Called with each line that a local command prints, from a thread of its own.

    Raises:
        ValueError: If Ray is not installed.
    """
    if not commands:
        return iter(())
    return _on_ray(commands, threads) if launcher == "ray" else _here(commands, jobs, on_line)


def _here(commands: Mapping[int, Command], jobs: int, on_line: OnLine) -> Iterator[tuple[int, str | None]]:
    processes: list[subprocess.Popen[str]] = []

    def run(number: int) -> str | None:
        with subprocess.Popen(
            commands[number], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            processes.append(process)
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said = (said + line)[-_LAST_WORDS:]
                on_line(number, line.rstrip())
        return _ending(process.returncode, said)

    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run, number): number for number in commands}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # interrupted, or nobody listens any more: nothing may go on behind
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        pool.shutdown()


def _on_ray(commands: Mapping[int, Command], threads: int) -> Iterator[tuple[int, str | None]]:
    try:
        import ray
    except ImportError:
        raise ValueError("--launcher ray needs the extra: pip install 'nsgd[ray]'") from None

    here = Path.cwd()

    def run(command: list[str]) -> str | None:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, cwd=here, text=True, errors="replace", **pipes)
        return _ending(done.returncode, done.stdout[-_LAST_WORDS:])

    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    # A task whose machine is lost counts as one that died; whoever calls tries it again.
    task = ray.remote(num_cpus=threads, max_retries=0)(run)
    waiting = {task.remote(list(command)): number for number, command in commands.items()}
    while waiting:
        (ended, *_), _ = ray.wait(list(waiting), num_returns=1)
        try:
            said = ray.get(ended)
        except ray.exceptions.RayError as error:
            said = str(error)[-_LAST_WORDS:]
        yield waiting.pop(ended), said


def _ending(code: int, said: str) -> str | None:
    if code == 0:
        return None
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    # What counts comes last: its own words, unless it had no time for any.
    return f"{said}\n{how}" if code < 0 or not said.strip() else f"{how}\n{said}"
