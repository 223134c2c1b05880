"""The jobs of claims.py, several at the same time on one GPU, and the file that their results go to."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worklist import Job, Search, Sweep, Task

from tokencut.errors import ArtifactError, TokencutError
from tokencut.files import atomic_write
from tokencut.sweep.state import load_state

HERE = Path(__file__).resolve().parent
RESULTS = "results.json"
# A job is begun if it takes no more than so much of the time left, by how long its like took.
CAUTION = 1.15
# So often a job may end without a result before it is left out.
TRIES = 2


class Results:
    """What has been found, in a file that is whole at any moment."""

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.lock = folder / RESULTS, threading.Lock()
        self.data: dict[str, Any] = {"conditions": conditions, "found": {}, "failed": {}, "runs": []}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
        held = self.data["conditions"]
        other = [name for name in conditions if name in held and held[name] != conditions[name]]
        # Models may come later; one that is there must be the same.
        before, now = held["models"], conditions["models"]
        if "models" in other and not any(before[name] != now[name] for name in before.keys() & now.keys()):
            other.remove("models")
            held["models"] = {**before, **now}
        if other:
            raise ArtifactError(f"{self.path} holds results with other {' and '.join(other)}; give another -o")

    def add(self, key: str, value: dict[str, Any]) -> None:
        """Notes a result."""
        with self.lock:
            if value.get("whole", True):
                self.data["failed"].pop(key, None)
            self.data["found"][key] = value
            self.save()

    def failed(self, key: str, reason: str) -> None:
        """Notes that a job came to nothing, and why."""
        with self.lock:
            tries = self.data["failed"].get(key, {"tries": 0})["tries"] + 1
            self.data["failed"][key] = {"tries": tries, "reason": reason}
            self.save()

    def open(self, job: Job) -> bool:
        """Whether a job is still to be done."""
        tries = self.data["failed"].get(job.key, {"tries": 0})["tries"]
        done = self.data["found"].get(job.key)
        whole = done is not None and (not isinstance(job, Sweep) or job.complete(done["rows"]))
        return tries < TRIES and not whole

    def save(self) -> None:
        """Writes the file."""
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self.data) + "\n", encoding="utf-8")


class Slot:
    """One of the jobs at the same time: a process that trains and judges, and commands that run beside it."""

    def __init__(self, bench: Bench, number: int) -> None:
        self.bench, self.number = bench, number
        self.judge: subprocess.Popen[str] | None = None
        self.running: subprocess.Popen[str] | None = None
        self.log = bench.work / f"job-{number}.log"

    def task(self, task: Task) -> dict[str, Any]:
        """Has a task carried out.

        Raises:
            TokencutError: It came to nothing.
        """
        if self.judge is None or self.judge.poll() is not None:
            self.judge = self._start([sys.executable, str(HERE / "judge.py")])
            self._tell(self.bench.setup)
        self._tell(asdict(task))
        assert self.judge.stdout is not None
        line = self.judge.stdout.readline()
        if not line:
            raise TokencutError(f"the process ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TokencutError(answer["error"])
        return {**asdict(task), **answer}  # a keep rate as it came out, not as it was asked for

    def command(self, words: list[str]) -> str:
        """Runs a tokencut command; its stdout.

        Raises:
            TokencutError: It failed.
        """
        setup = self.bench.setup
        running = ["--device", str(setup["device"]), "-j", str(setup["workers"]), "-b", str(setup["batch"]), "--json"]
        process = self._start([sys.executable, "-m", *words, *running])
        self.running = process
        output, _ = process.communicate()
        if process.returncode:
            raise TokencutError(f"exit code {process.returncode}: {self._last_words()}")
        return output

    def end(self) -> None:
        """Ends what runs, with all that it has started."""
        for process in (self.judge, self.running):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        with self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip

    def _tell(self, words: dict[str, Any]) -> None:
        assert self.judge is not None
        assert self.judge.stdin is not None
        print(json.dumps(words), file=self.judge.stdin, flush=True)

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


class Bench:
    """All jobs, on several slots, until they are done or time is up."""

    def __init__(
        self, jobs: Sequence[Job], results: Results, setup: dict[str, Any], work: Path, say: Callable[[str], None]
    ) -> None:
        """Prepares the jobs that are not done.

        Args:
            jobs: All jobs, the first to be done first.
            results: Where results go.
            setup: What `judge.Judge` takes.
            work: A folder for sweeps under way, and for what the processes say.
            say: Told, in a line, what is done.
        """
        self.results, self.setup, self.work, self.say = results, setup, work, say
        self.work.mkdir(parents=True, exist_ok=True)
        self.waiting = [job for job in jobs if results.open(job)]
        self.began, self.until = time.monotonic(), math.inf
        self.lock = threading.Lock()
        self.ending = False

    def run(self, slots_wanted: int, until: float = math.inf) -> None:
        """Does what it can, so many jobs at the same time, until `time.monotonic()` comes to `until`."""
        self.until = until
        slots = [Slot(self, number) for number in range(min(slots_wanted, len(self.waiting)))]
        threads = [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                left = self.until - time.monotonic()
                thread.join(None if math.isinf(left) else max(0.0, left))
        finally:
            self.ending = True
            for slot in slots:
                slot.end()
            for thread in threads:
                thread.join(5)

    def _serve(self, slot: Slot) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            try:
                self._carry_out(slot, job)
                self.say(f"{time.monotonic() - self.began:5.0f} s, {len(self.waiting)} left: {job.key}, "
                         f"{time.monotonic() - began:.0f} s, {self._shown(job)}")  # fmt: skip
            except (TokencutError, OSError, ValueError, LookupError, TypeError) as error:
                if self.ending:
                    return
                self.results.failed(job.key, str(error))
                self.say(f"failed: {job.key}: {error}")
                with self.lock:
                    self.waiting += [job] if self.results.open(job) else []

    def _next(self) -> Job | None:
        """The first job that there is time for."""
        with self.lock:
            for job in self.waiting:
                if not self.ending and time.monotonic() + CAUTION * self._expected(job) < self.until:
                    self.waiting.remove(job)
                    return job
        return None

    def _expected(self, job: Job) -> float:
        """Seconds that the longest of its like took; 0 where there was none."""
        like = [
            found["seconds"]
            for found in list(self.results.data["found"].values())
            if isinstance(job, Task) and (found.get("label"), found.get("epochs")) == (job.label, job.epochs)
        ]
        return max(like, default=0.0)

    def _carry_out(self, slot: Slot, job: Job) -> None:
        if isinstance(job, Task):
            self.results.add(job.key, slot.task(job))
        elif isinstance(job, Sweep):
            self._sweep(slot, job)
        else:
            self._search(slot, job)

    def _sweep(self, slot: Slot, job: Sweep) -> None:
        folder, began = self.work / job.key.replace(" ", "-"), time.monotonic()
        words = job.words(self.setup["folders"][job.label], self.setup["val"], str(folder))
        limit = ["--limit", str(self.setup["limit"])] if self.setup["limit"] else []
        try:
            slot.command([*words, *limit])
        finally:
            state = load_state(folder)
            if state is not None:
                rows = [
                    {"method": row.method, "keep": row.keep, "gmacs": row.gmacs, "top1": row.top1,
                     "correct": "".join("01"[right] for right in row.correct)} for row in state.rows.values()
                ]  # fmt: skip
                self.results.add(
                    job.key, {"rows": rows, "whole": job.complete(rows), "seconds": time.monotonic() - began}
                )

    def _search(self, slot: Slot, job: Search) -> None:
        """Searches, and has what was found judged as it is and fine-tuned."""
        dense, output = self.results.data["found"][Task(job.label).key], self.work / f"{job.label}-searched.safetensors"
        gmacs = (1 - job.saved / 100) * dense["gmacs"]
        words = job.words(self.setup["folders"][job.label], self.setup["train"], gmacs, str(output))
        began = time.monotonic()
        made = json.loads(slot.command([*words, "--force"]))
        searching = time.monotonic() - began
        keep = tuple(made["keep"]) if isinstance(made["keep"], list) else made["keep"]
        found = Task(job.label, made["method"], keep, layers=tuple(made["layers"]))
        answers = [slot.task(task) for task in (found, Task(**{**asdict(found), "epochs": job.epochs}))]
        schedule = {"keep": made["keep"], "layers": made["layers"], "searching": searching}
        measured = {"shelf": answers[0], "tuned": answers[1], "seconds": time.monotonic() - began}
        self.results.add(job.key, {**schedule, **measured})

    def _shown(self, job: Job) -> str:
        found = self.results.data["found"][job.key]
        return f"{found['top1']:.2f} %" if "top1" in found else ""
