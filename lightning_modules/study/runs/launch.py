"""Where runs are made: in this process, in workers beside it, or each as a task of a Ray cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Launcher = Literal["local", "ray"]
Command = Sequence[str]

LAST_WORDS = 4000  # characters of what a process that died had printed


def launch_on_ray(commands: Mapping[int, Command], *, threads: int, gpus: int) -> Generator[tuple[int, str | None]]:
    """Run commands as tasks, and yield the number of each as it ends, with what it said if it died.

    Args:
        commands: By number. The machines of the cluster need this environment and the same folders.
        threads: Cores that each takes.
        gpus: GPUs that each takes, 1 or 0.

    Raises:
        ValueError: If Ray is not installed.
    """
    if not commands:
        return
    try:
        import ray
    except ImportError:
        raise ValueError("--launcher ray needs the extra: pip install 'nsgd[ray]'") from None

    here = Path.cwd()

    def run(command: list[str]) -> str | None:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, cwd=here, text=True, errors="replace", **pipes)
        return ending(done.returncode, done.stdout[-LAST_WORDS:])

    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    # A task whose machine is lost counts as one that died; whoever calls tries it again.
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(run)
    waiting = {task.remote(list(command)): number for number, command in commands.items()}
    while waiting:
        (ended, *_), _ = ray.wait(list(waiting), num_returns=1)
        try:
            words = ray.get(ended)
        except ray.exceptions.RayError as error:
            words = str(error)[-LAST_WORDS:]
        yield waiting.pop(ended), words


def ending(code: int, printed: str) -> str | None:
    """How a process died, and what it had printed; None of one that ended well.

    Args:
        code: Its exit code, or minus the signal that ended it.
        printed: Its last words.
    """
    if code == 0:
        return None
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    # What counts comes last: its own words, unless it had no time for any.
    return "\n".join(filter(None, [printed.rstrip(), how] if code < 0 else [how, printed.rstrip()]))
