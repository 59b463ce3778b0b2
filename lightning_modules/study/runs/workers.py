"""Processes that make runs one after the other, since starting one takes seconds; and what they and a study say.

A worker reads numbers of runs on its standard input, a line each, and answers on its standard output in lines of JSON:
how a run stands, and how it ended. It ends when its input does, so none outlives the study, however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from io import TextIOWrapper
from queue import SimpleQueue
from typing import IO, Any

from lightning_modules.study.runs.launch import LAST_WORDS, ending
from lightning_modules.support.whole_files import unwritable

OnStep = Callable[[int, int, float], None]  # number of the run, steps done, their last loss
Make = Callable[[int, Callable[[int, float], None]], None]  # makes the run of a number, and calls with steps and loss

_PAUSE = 0.1  # seconds, at least, between two words on how a run stands


class Workers:
    """Processes that live until the study has no more runs for them; as a context, none is left behind.

    A worker that dies takes the run that it was making with it, and no other: the next run has a new worker.

    Args:
        command: Starts one.
        jobs: Workers at a time.
        on_step: Called as runs go on, from threads of their own.
        places: What is added to the environment of a worker. Each new one takes that which the fewest have.
    """

    def __init__(
        self, command: Sequence[str], *, jobs: int, on_step: OnStep, places: Sequence[Mapping[str, str]] = ({},)
    ) -> None:
        self._command, self._jobs, self._on_step, self._places = list(command), jobs, on_step, places
        self._idle: list[_Worker] = []
        self._started: list[_Worker] = []
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for worker in self._started:
            worker.release()

    def _kill(self) -> None:
        """End every worker at once, whatever it is doing."""
        with self._lock:
            self._closed = True
            for worker in self._started:
                worker.kill()

    def make(self, numbers: Iterable[int]) -> Generator[tuple[int, str | None]]:
        """Have runs made, and yield the number of each as it ends, with what it said if it died.

        Args:
            numbers: Of the runs, none of which needs another.
        """
        threads = ThreadPoolExecutor(self._jobs)
        left = {threads.submit(self._make, number): number for number in numbers}
        try:
            for future in as_completed(list(left)):
                yield left.pop(future), future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            if left:  # interrupted, or nobody listens any more: nothing may go on behind
                self._kill()
            threads.shutdown()

    def _make(self, number: int) -> str | None:
        worker = self._take()
        ended, words = worker.make(number, self._on_step)
        if ended:
            with self._lock:
                self._idle.append(worker)
        return words

    def _take(self) -> _Worker:
        """A worker that waits, or a new one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                worker.kill()  # what it has left
            if self._closed:
                raise RuntimeError("expected workers that are open, got closed ones; make others")
            taken = [worker.place for worker in self._started if worker.alive]
            worker = _Worker(self._command, min(self._places, key=taken.count))
            self._started.append(worker)
            return worker


class _Worker:
    """One process, seen from the study."""

    def __init__(self, command: Sequence[str], place: Mapping[str, str]) -> None:
        self.place = place
        # In a session of its own: Ctrl-C comes to the study alone, which ends its workers and what they started.
        self._process = subprocess.Popen(
            command,
            env=os.environ | dict(place),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._ended = False
        self._printed = ""
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        # What it forked holds its pipes open, so its end is not seen by them alone.
        threading.Thread(target=self.kill_when_over, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def make(self, number: int, on_step: OnStep) -> tuple[bool, str | None]:
        """Have a run made; returns whether the worker lives on, and what was said if the run died.

        Raises:
            OSError: If there is no room on a disk, or it is read-only, which is no run's fault.
        """
        try:
            _pipe(self._process.stdin).write(f"{number}\n")
            _pipe(self._process.stdin).flush()
        except OSError:  # it died while it waited
            return False, self._ending()
        for line in _pipe(self._process.stdout):
            try:
                step, loss, words = json.loads(line)
            except (TypeError, ValueError):  # printed before the worker could take its output for itself
                self._printed += line
                continue
            if step is None:
                self._printed = ""
                if loss is not None:  # nothing can be written: of no run's making, and the others would meet it too
                    raise OSError(*loss)
                return True, words
            on_step(number, step, loss)
        return False, self._ending()

    def kill(self) -> None:
        """End it, with the processes that it started; once, since another process may have its number later."""
        with self._lock:
            if not self._ended:
                self._ended = True
                with suppress(ProcessLookupError):
                    if hasattr(os, "killpg"):
                        os.killpg(self._process.pid, signal.SIGKILL)
                    else:
                        self._process.kill()
        self._process.wait()

    def kill_when_over(self) -> None:
        """Wait for its end, and end what it has left."""
        self._process.wait()
        self.kill()

    def release(self) -> None:
        """Close the pipes of a process that has ended."""
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError):  # of what it was sent, and did not read
                _pipe(pipe).close()

    def _ending(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self.kill()  # what it has left, or itself where it has closed its output and goes on
        self._listener.join()
        return ending(self._process.returncode, self._printed) or f"{self._printed}ended before the run did"

    def _listen(self) -> None:
        for line in _pipe(self._process.stderr):
            self._printed = (self._printed + line)[-LAST_WORDS:]


def _pipe(file: IO[str] | None) -> IO[str]:
    if file is None:
        raise RuntimeError("expected a process with pipes, got one without")
    return file


def serve(make: Make) -> None:
    """Make the runs whose numbers come on standard input, until it ends; what a run prints goes to standard error.

    Args:
        make: Makes one. What it raises ends that run, but for what ends a process.
    """
    read, write = os.dup(0), os.dup(1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # a run that reads its input finds nothing, and no numbers of runs
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that the last words of a run that is killed are there
    os.dup2(2, 1)
    numbers: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_hear, args=(read, numbers), daemon=True).start()
    while True:
        number = numbers.get()
        words, barred = None, None
        try:
            make(number, _Teller(write))
        except Exception as error:  # whatever it was, the other runs go on; the study says it, and never counts it
            words = traceback.format_exc()[-LAST_WORDS:]
            barred = unwritable(error)
        _tell(write, None, barred and (barred.errno, barred.strerror, barred.filename), words)


def _hear(read: int, numbers: SimpleQueue[int]) -> None:
    """Put numbers into a queue, and end the process with its input: nobody waits for what it makes any more."""
    # Not by sys.stdin, whose lock a thread that waits for it would hold when the process ends.
    text = b""
    while part := os.read(read, 4096):
        *lines, text = (text + part).split(b"\n")
        for line in lines:
            numbers.put(int(line))
    os._exit(0)


class _Teller:
    """Says how a run stands, now and then."""

    def __init__(self, write: int) -> None:
        self._write, self._next = write, 0.0

    def __call__(self, step: int, loss: float) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PAUSE
            _tell(self._write, step, loss, None)


def _tell(write: int, *values: Any) -> None:
    line = json.dumps(values).encode() + b"\n"
    while line:
        line = line[os.write(write, line) :]
