"""Tasks carried out by several processes that live on between them, each with what takes long to load loaded once."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tokencut.errors import TokencutError
from tokencut.observers import Observer

# The runner imports this first, so that time limits count what torch takes to load.
STARTED = time.monotonic()

# Called with a task in a process of its own; both must be found by name there.
Work = Callable[[Any], Any]


def carried_out(
    work: Work,
    tasks: Sequence[Any],
    *,
    jobs: int,
    until: float = math.inf,
    seconds: Callable[[Any], float] = lambda task: 0.0,
    on_failure: Callable[[Any, TokencutError], bool] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Carries out tasks, in this process where there is one job and no hurry.

    Args:
        work: What to do with a task.
        tasks: In the order to begin them.
        jobs: How many processes work at the same time.
        until: By `time.monotonic`; then what is still at work is ended.
        seconds: How long a task takes, as far as is known: what would not be done in time is not begun.
        on_failure: Told a task and what it met; gives whether to try it once more. The first failure ends all where
            None.

    Yields:
        Each task with its result, as they are done.

    Raises:
        TokencutError: What a task met, without `on_failure`.
    """
    left = list(tasks)

    def next_task() -> Any:
        for task in left:
            if time.monotonic() + seconds(task) < until:
                left.remove(task)
                return task
        return None

    def fail(task: Any, error: TokencutError) -> None:
        if on_failure is None:
            raise error
        if on_failure(task, error):
            left.append(task)

    if jobs == 1 and math.isinf(until):
        while (task := next_task()) is not None:
            try:
                result = work(task)
            except TokencutError as error:
                fail(task, error)
            else:
                yield task, result
        return
    workers: list[_Worker] = []
    try:
        while True:
            idle = [worker for worker in workers if worker.task is None]
            while (idle or len(workers) < jobs) and (task := next_task()) is not None:
                if not idle:
                    workers.append(_Worker(work))
                    idle.append(workers[-1])
                idle.pop().begin(task)
            busy = {worker.link: worker for worker in workers if worker.task is not None}
            if not busy or time.monotonic() >= until:
                return
            for link in wait(busy, timeout=min(60.0, max(0.0, until - time.monotonic()))):
                assert isinstance(link, Connection)
                task = busy[link].task
                try:
                    result = busy[link].result()
                except TokencutError as error:
                    fail(task, error)
                else:
                    yield task, result
            workers = [worker for worker in workers if worker.process.is_alive()]
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and the task that it is at."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
        self.link, there = context.Pipe()
        # No daemon: those may not have processes of their own, which load the images.
        self.process = context.Process(target=_serve, args=(there, work, os.getpid()))
        self.process.start()
        there.close()
        self.task: Any = None

    def begin(self, task: Any) -> None:
        self.task = task
        self.link.send(task)

    def result(self) -> Any:
        self.task = None
        try:
            result, problem = self.link.recv()
        except (EOFError, OSError):
            self.end()
            raise TokencutError("a process ended unexpectedly, often for want of memory; type fewer --jobs") from None
        if problem is not None:
            raise problem
        return result

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(link: Connection, work: Work, parent: int) -> None:
    """Works on what the parent sends, as long as it lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends this
    # A spawned process has those that load images spawned too, each of which imports torch: half a minute for a loader.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        task = link.recv()
        try:
            link.send((work(task), None))
        except TokencutError as error:
            link.send((None, error))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def say(text: str) -> None:
    """A line of progress on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


class Lines(Observer):
    """Says what is noted on the way."""

    def note(self, text: str) -> None:
        say(text)

    def warning(self, text: str) -> None:
        say(text)
