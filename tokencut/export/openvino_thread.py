"""Where OpenVINO compiles models: in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def off_this_thread(call: Callable[[], Any]) -> Any:
    """Calls something of OpenVINO that compiles a model, in a thread that ends with it.

    OpenVINO (2026.4) gives the thread in which its CPU plugin is loaded another stack for signals, and unmaps it with
    the plugin. Of two plugins of which the first loaded goes first, the second puts that stack back which is no more:
    the thread is killed by its next signal, such as that of a child process that ends.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()
