"""Tasks carried out by several processes that live on between them, each with what takes long to load loaded once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tokencut.errors import TokencutError

# Called with a task in a process of its own; both must be found by name there.
Work = Callable[[Any], Any]


def carried_out(work: Work, tasks: Sequence[Any], *, jobs: int, until: float) -> Iterator[tuple[Any, Any]]:
    """Carries out tasks, in this process where one job is enough.

    Args:
        work: What to do with a task.
        tasks: In the order to begin them.
        jobs: How many processes work at the same time.
        until: By `time.monotonic`; then what is still at work is ended, in this process after the task.

    Yields:
        Each task with its result, as they are done.

    Raises:
        TokencutError: What a task met.
    """
    if jobs == 1:
        for task in tasks:
            if time.monotonic() >= until:
                return
            yield task, work(task)
        return
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    left, links = list(tasks), {}
    try:
        for _ in range(min(jobs, len(left))):
            here, there = context.Pipe()
            # No daemon: those may not have processes of their own, which load the images.
            links[here] = context.Process(target=_serve, args=(there, work, os.getpid()))
            links[here].start()
            there.close()
            here.send(left.pop(0))
        busy = list(links)
        while busy and time.monotonic() < until:
            for link in wait(busy, timeout=min(60.0, max(0.0, until - time.monotonic()))):
                assert isinstance(link, Connection)
                done = _received(link)
                if left:
                    link.send(left.pop(0))
                else:
                    busy.remove(link)
                yield done
    finally:
        for process in links.values():
            process.kill()
            process.join()


def _received(link: Connection) -> tuple[Any, Any]:
    try:
        task, result, problem = link.recv()
    except EOFError:
        raise TokencutError("a process ended unexpectedly, often for want of memory; type fewer --jobs") from None
    if problem is not None:
        raise problem
    return task, result


def _serve(link: Connection, work: Work, parent: int) -> None:
    """Works on what the parent sends, as long as it lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends this
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        task = link.recv()
        try:
            link.send((task, work(task), None))
        except TokencutError as error:
            link.send((task, None, error))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
