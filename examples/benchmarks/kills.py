"""Does a fine-tune survive being killed? Kills one again and again at random moments, and resumes it.

    OMP_NUM_THREADS=1 python examples/benchmarks/run.py kills --kills 200

The bundled digits model is compressed and fine-tuned on a few of its training images, beside files of a user's. First
a run that nobody disturbs; then runs that each are killed several times at random moments, and go on by `--resume`:
by SIGKILL, by SIGTERM, and by a disk that is full (a small tmpfs where mounting is allowed, else a limit on the size of
a file). At the end of each the file has to be equal to the undisturbed one to the last byte, and at all times what the
user had there, to the last byte as well. Nothing may be left over but the log, and what SIGKILL leaves of a file that
was being written (`.out.safetensors.*.part`).

Each run is a process of its own, forked from one that has loaded torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokencut.cli.app import main as tokencut
from tokencut.data.sources import open_source
from tokencut.errors import TokencutError

WAYS = ("SIGKILL", "SIGTERM", "full disk")
OUTPUT = "out.safetensors"
IMAGES_A_CLASS = 4
# Room for the outputs and two states, in MiB.
DISK = 24
# How often one run is killed at most before it is let to its end.
MOST_KILLS = 8


def make_images(folder: Path) -> None:
    """A folder with a few training digits of each class."""
    source, made = open_source("digits", split="train"), Counter[str]()
    for index, (file, label) in enumerate(source):
        name = source.classes[label]
        if made[name] < IMAGES_A_CLASS:
            made[name] += 1
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{index}.png").write_bytes(file.read())


def make_users_files(folder: Path) -> dict[str, str]:
    """Files of a user's around the output, some with names like ours; their digests."""
    (folder / "out").mkdir()
    for name in ("precious.txt", "out.txt", "out/notes.txt", "out-best.safetensors", ".out.part", "state.pt"):
        (folder / name).write_text(f"{name} is the user's\n" * 100)
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def words(folder: Path, images: Path, epochs: int, *, resume: bool) -> list[str]:
    """The command line of a run."""
    return [
        "compress", "digits", "--keep", "0.5", "-o", str(folder / OUTPUT), "--train-data", str(images), "-b", "8", "-j",
        "0", "--device", "cpu", "--finetune-epochs", str(epochs), "--select", "last", *(["--resume"] if resume else []),
    ]  # fmt: skip


def start(line: list[str], log: Path) -> int:
    """Starts a run in a process of its own; its number."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        with log.open("a") as told:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        code = 70
        with contextlib.suppress(BaseException):
            code = tokencut(line)
        os._exit(code)
    return number


def ended(number: int) -> int | None:
    """How a process ended, negative by a signal; None while it lives."""
    found, status = os.waitpid(number, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(number: int) -> int:
    """Waits for a process; how it ended."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@contextlib.contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """A folder on a tmpfs of its own; where that may not be mounted, any, and False."""
    with tempfile.TemporaryDirectory() as name:
        mounted = shutil.which("mount") is not None and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", name], capture_output=True, check=False
        ).returncode  # fmt: skip
        try:
            yield Path(name), mounted
        finally:
            if mounted:
                subprocess.run(["umount", "-l", name], check=True)


def fill(folder: Path, free: int) -> None:
    """Takes all of a disk but so many bytes."""
    space = os.statvfs(folder)
    with (folder / "filler").open("wb") as file, contextlib.suppress(OSError):
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_frsize - free))


def kill(number: int, way: str, folder: Path, mounted: bool, rng: random.Random) -> int:
    """Disturbs a run that is alive, and waits for its end; how it ended."""
    if way == "full disk":
        free = rng.randrange(4096, 1 << 20)
        if mounted:
            fill(folder, free)
        else:
            resource.prlimit(number, resource.RLIMIT_FSIZE, (free, free))
        code = wait(number)
        (folder / "filler").unlink(missing_ok=True)
        return code
    os.kill(number, signal.Signals[way])
    return wait(number)


class Trial:
    """Runs in one folder, until the file is there."""

    def __init__(self, folder: Path, mounted: bool, images: Path, epochs: int, log: Path) -> None:
        self.folder, self.mounted, self.images, self.epochs, self.log = folder, mounted, images, epochs, log
        self.users = make_users_files(folder)

    def check_users(self, when: str) -> None:
        """Whether all that was the user's is as it was.

        Raises:
            TokencutError: It is not.
        """
        now = digests(self.folder)
        lost = [name for name, digest in self.users.items() if now.get(name) != digest]
        if lost:
            raise TokencutError(f"{when}, the user's {', '.join(lost)} are not as they were; the log is {self.log}")

    def undisturbed(self) -> tuple[str, float]:
        """Runs to the end; the file's digest, and the time in seconds."""
        began = time.monotonic()
        code = wait(start(words(self.folder, self.images, self.epochs, resume=False), self.log))
        if code != 0:
            raise TokencutError(f"the undisturbed run ended with {code}; the log is {self.log}")
        return digests(self.folder)[OUTPUT], time.monotonic() - began

    def killed(self, times: int, seconds: float, rng: random.Random, counts: Counter[str]) -> None:
        """Kills a run so many times at random moments, and lets it end then."""
        resume = False
        for _ in range(times):
            way = rng.choice(WAYS)
            number = start(words(self.folder, self.images, self.epochs, resume=resume), self.log)
            time.sleep(rng.uniform(0, seconds))
            code = ended(number)
            if code is None:
                code = kill(number, way, self.folder, self.mounted, rng)
                counts[way if code != 0 else "ended first"] += 1
            else:
                counts["ended first"] += 1
            self.check_users(f"after {way} (exit code {code})")
            if code == 0:
                return
            resume = True
        code = wait(start(words(self.folder, self.images, self.epochs, resume=resume), self.log))
        if code != 0:
            raise TokencutError(f"a run that went on ended with {code}; the log is {self.log}")
        self.check_users("at the end")

    def check_result(self, expected: str) -> None:
        """Whether the file is the undisturbed one, and nothing is left over.

        Raises:
            TokencutError: It is not.
        """
        now = digests(self.folder)
        if now.pop(OUTPUT) != expected:
            raise TokencutError(f"{self.folder / OUTPUT} is not that of the undisturbed run; the log is {self.log}")
        left = sorted(name for name in now.keys() - self.users.keys() - {"out.log.csv"} if not name.endswith(".part"))
        if left or (self.folder / f"{OUTPUT}.resume").exists():
            raise TokencutError(f"left over: {', '.join(left) or 'the folder of the state'}; the log is {self.log}")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many (%(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Runs."""
    args = parse()
    rng, counts, trials = random.Random(args.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        images, log = Path(name) / "images", Path(name) / "log.txt"
        make_images(images)
        # Whatever is loaded at first use is loaded here, and not in each process anew.
        quick = ["compress", "digits", "--keep", "0.5", "-o", f"{name}/warm.safetensors", "--train-data", str(images),
                 "-j", "0", "--device", "cpu", "--finetune-epochs", "1"]  # fmt: skip
        with log.open("w") as told, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            tokencut(quick)
        with small_disk() as (folder, mounted):
            expected, seconds = Trial(folder, mounted, images, args.epochs, log).undisturbed()
        print(f"undisturbed: {seconds:.1f} s; full disk by a {'tmpfs' if mounted else 'limit on the size of files'}")
        while sum(counts[way] for way in WAYS) < args.kills:
            with small_disk() as (folder, mounted):
                trial = Trial(folder, mounted, images, args.epochs, log)
                left = args.kills - sum(counts[way] for way in WAYS)
                trial.killed(min(left, rng.randint(1, MOST_KILLS)), seconds, rng, counts)
                trial.check_result(expected)
            trials += 1
            done = sum(counts[way] for way in WAYS)
            print(f"\r{done} of {args.kills} kills, {trials} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    total, told = sum(counts[way] for way in WAYS), ", ".join(f"{way} {counts[way]}" for way in WAYS)
    print(
        f"{total} kills ({told}) of {trials} runs; every file equal to the last byte, and nothing of the user's touched"
    )


if __name__ == "__main__":
    main()
