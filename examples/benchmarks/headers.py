"""Does anything but a clear error come of a damaged file? Throws mutated headers at what reads them.

    python examples/benchmarks/run.py headers --count 100000 -o headers.json
    python examples/benchmarks/run.py headers --only 31415

A small tokencut file is written once. Each mutation changes its header in one of many ways: bits, bytes and slices of
the whole, its length, the JSON of its tensors, and the JSON that describes the model, by value and by letter.
What says what a file holds (`tokencut info`) reads each, without building a model. It must answer or raise a
TokencutError: another class of exception, a reading that takes seconds, or a process that grows beyond a gigabyte is a
failure, which is told with the number that makes it again.

The mutations are read in pieces, each in a process of its own that is ended when it hangs; the same command goes on
where it was cut off.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from results import Results

import tokencut
from tokencut.errors import TokencutError
from tokencut.models.artifact import KEY, read_info

# A reading takes about a millisecond; in seconds, what is no longer an answer.
HANGS = 10.0
# In MiB, with what torch and timm take.
MOST_MEMORY = 1024
PIECE = 2_000
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-9, 1e308, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, "", "0", "bat",
    "foo", "\x1b[2J\nerror: x", "\ud800", "x" * 100_000, [], [[]], [0], [0] * 2_000, {}, {"": {}}, {"a": 1},
    float("nan"), float("inf"), "__proto__", "../../etc/passwd", "F32", [1, 2, 3], [-1, -1], [2**62, 2**62],
]  # fmt: skip


def small_file(folder: Path) -> bytes:
    """A tokencut file of some kilobytes."""
    model = timm.create_model("test_vit", img_size=32, num_classes=3, embed_dim=8, num_heads=2, depth=2)
    model.pretrained_cfg["label_names"] = ["ant", "bee", "cat"]
    path = folder / "small.safetensors"
    tokencut.save(tokencut.compress(model, keep=0.5, layers=[1, 2]), path)
    return path.read_bytes()


def mutated(content: bytes, number: int, seed: int = 0) -> bytes:
    """A file with another header: the same for the same number and seed."""
    rng = random.Random(f"{seed}:{number}")
    way = rng.choice(WAYS)
    return way(content, rng)


def _parts(content: bytes) -> tuple[bytes, bytes]:
    """The header and the tensors of a file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def _joined(header: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits and bytes of the header, its length among them."""
    header, tensors = _parts(content)
    changed = bytearray(content[:8] + header)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        position = rng.randrange(len(changed))
        changed[position] = rng.choice((changed[position] ^ (1 << rng.randrange(8)), rng.randrange(256)))
    return bytes(changed) + tensors


def change_length(content: bytes, rng: random.Random) -> bytes:
    """The length that the file gives of its header."""
    header, tensors = _parts(content)
    near = len(header) + rng.randint(-9, 9)
    length = rng.choice((0, 1, 2, near, near, len(content), 2**31, 100_000_000, 100_000_001, 2**63, 2**64 - 1))
    return struct.pack("<Q", max(length, 0)) + header + tensors


def move_slices(content: bytes, rng: random.Random) -> bytes:
    """Slices of the header that are cut out, doubled, or put in elsewhere."""
    header, tensors = _parts(content)
    first, last = sorted(rng.randrange(len(header) + 1) for _ in range(2))
    last = min(last, first + rng.choice((1, 10, 1_000, 10**6)))
    place = rng.randrange(len(header) + 1)
    piece = header[first:last]
    made = rng.choice((header[:first] + header[last:], header[:place] + piece + header[place:], piece, b""))
    return _joined(made, tensors) if rng.random() < 0.8 else content[:8] + made + tensors


def cut_off(content: bytes, rng: random.Random) -> bytes:
    """A file that ends early, or goes on behind its end."""
    return rng.choice((content[: rng.randrange(len(content))], content + rng.randbytes(rng.randrange(1, 100))))


def change_header(content: bytes, rng: random.Random) -> bytes:
    """Values of the JSON that says which tensors there are."""
    header, tensors = _parts(content)
    data = json.loads(header)
    for _ in range(rng.choice((1, 1, 2, 4))):
        change_value(data, rng)
    return _joined(_json(data), tensors)


def change_description(content: bytes, rng: random.Random) -> bytes:
    """Values of the JSON that describes the model."""
    header, tensors = _parts(content)
    data = json.loads(header)
    told = json.loads(data["__metadata__"][KEY])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change_value(told, rng)
    data["__metadata__"][KEY] = _json(told).decode()
    return _joined(_json(data), tensors)


def change_letters(content: bytes, rng: random.Random) -> bytes:
    """Letters of the text that describes the model, so that most often it is no JSON, or deep or doubled JSON."""
    header, tensors = _parts(content)
    data = json.loads(header)
    text = data["__metadata__"][KEY]
    for _ in range(rng.choice((1, 1, 3, 10))):
        place = rng.randrange(len(text))
        put = rng.choice(
            ('"', "{", "}", "[", "]", ",", ":", "\\", "\x00", "9" * 5_000, "[" * 100_000, "NaN", "-", "e9", "")
        )
        text = text[:place] + put + text[place + rng.choice((0, 1, 2)) :]
    data["__metadata__"][KEY] = text
    return _joined(_json(data), tensors)


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    change_bytes, change_length, move_slices, cut_off, change_header, change_header, change_letters,
    *[change_description] * 5,
)  # fmt: skip


def _json(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode("utf-8", errors="surrogatepass")


def change_value(data: Any, rng: random.Random) -> None:
    """Changes a value somewhere inside: another one, none, one more, or that of another place."""
    places = _places(data)
    if not places:
        return
    inside, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(("", "x", "type", "format", "keep", "__class__", "tokencut.x", "y" * 1_000))] = rng.choice(
            ODD
        )
    elif kind == 2:
        other, name = rng.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            inside[key] = copy.deepcopy(other[name])
    elif isinstance(inside[key], (int, float)) and rng.random() < 0.5:
        inside[key] = rng.choice((inside[key] + rng.choice((-1, 1, 0.5)), -inside[key], inside[key] * 10**6))
    else:
        inside[key] = copy.deepcopy(rng.choice(ODD))


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Each container inside with each key or position of it."""
    if not isinstance(data, (dict, list)) or not data:
        return []
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    found: list[tuple[Any, Any]] = [(data, key) for key, _ in items]
    for _, value in items:
        found += _places(value)
    return found


def outcome(path: Path) -> tuple[str, str | None]:
    """What comes of reading a file: a word on it, and what is wrong with that, where something is."""
    try:
        read_info(path).to_text()
    except TokencutError as error:
        line = str(error)
        return type(error).__name__, None if line.strip() else "an error without words"
    except Exception as error:  # noqa: BLE001 (which classes there are is the question)
        return type(error).__name__, f"{type(error).__name__}: {error}"[:300]
    return "read", None


def read_piece(first: int, count: int, seed: int, at: Any, made: Any) -> None:
    """Reads a piece in a process of its own.

    Args:
        first: The number of the first mutation.
        count: How many.
        seed: Of the mutations.
        at: Told the number that is being read.
        made: Takes the result.
    """
    outcomes: Counter[str] = Counter()
    failures, slowest = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path, content = Path(folder) / "mutated.safetensors", small_file(Path(folder))
        for number in range(first, first + count):
            path.write_bytes(mutated(content, number, seed))
            at.value = number
            began = time.perf_counter()
            word, wrong = outcome(path)
            slowest = max(slowest, time.perf_counter() - began)
            outcomes[word] += 1
            if wrong is not None:
                failures[number] = wrong
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    made.put({"outcomes": dict(outcomes), "failures": failures, "slowest_s": slowest, "memory_mib": memory})


def watched_piece(first: int, count: int, seed: int) -> dict[str, Any]:
    """Reads a piece, and ends it where one reading hangs or the process is gone: that is a failure of its number."""
    context = multiprocessing.get_context("spawn")
    at, made = context.Value("q", -1), context.Queue()
    process = context.Process(target=read_piece, args=(first, count, seed, at, made), daemon=True)
    process.start()
    last, since = -1, time.monotonic()
    while process.is_alive() and made.empty():
        time.sleep(0.05)
        if at.value != last:
            last, since = at.value, time.monotonic()
        if last >= 0 and time.monotonic() - since > HANGS:
            process.kill()
    if not made.empty():
        found: dict[str, Any] = made.get()
        process.join()
        return found
    process.join()
    number = at.value
    why = f"hangs for more than {HANGS:g} s" if process.exitcode == -9 else f"ended with {process.exitcode}"
    before = watched_piece(first, number - first, seed) if number > first else _nothing()
    after = watched_piece(number + 1, first + count - number - 1, seed) if number + 1 < first + count else _nothing()
    return merged([before, {**_nothing(), "outcomes": {"gone": 1}, "failures": {number: why}}, after])


def _nothing() -> dict[str, Any]:
    return {"outcomes": {}, "failures": {}, "slowest_s": 0.0, "memory_mib": 0.0}


def merged(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of several pieces as one."""
    outcomes: Counter[str] = Counter()
    failures: dict[Any, str] = {}
    for piece in pieces:
        outcomes.update(piece["outcomes"])
        failures |= piece["failures"]
    most = {name: max((piece[name] for piece in pieces), default=0.0) for name in ("slowest_s", "memory_mib")}
    return {"outcomes": dict(outcomes), "failures": failures, **most}


def summary(found: dict[str, Any]) -> list[str]:
    """The result in words."""
    total = sum(found["outcomes"].values())
    counts = ", ".join(f"{word} {count:,}" for word, count in sorted(found["outcomes"].items()))
    extremes = f"slowest {1000 * found['slowest_s']:.0f} ms, {found['memory_mib']:.0f} MiB at most"
    lines = [f"{total:,} mutated headers: {counts}", f"{len(found['failures'])} failures; {extremes}"]
    return lines + [f"  {number}: {wrong}" for number, wrong in list(found["failures"].items())[:20]]


def failed(found: dict[str, Any]) -> bool:
    """Whether anything is not as it must be."""
    return bool(found["failures"]) or found["slowest_s"] > HANGS or found["memory_mib"] > MOST_MEMORY


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="how many mutations (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (%(default)s)")
    parser.add_argument("--only", type=int, metavar="N", help="read one of them, and show what it raises")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keeps pieces that are done, to go on with")
    return parser.parse_args()


def main() -> None:
    """Runs."""
    args = parse()
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mutated.safetensors"
            path.write_bytes(mutated(small_file(Path(folder)), args.only, args.seed))
            print(read_info(path).to_text())
        return
    results = Results(args.output, {"seed": args.seed}) if args.output else None
    pieces = []
    for first in range(0, args.count, PIECE):
        count = min(PIECE, args.count - first)
        key = f"{first}+{count}"
        found = results.rows.get(key) if results else None
        if found is None:
            found = watched_piece(first, count, args.seed)
            if results:
                results.add(key, found)
        pieces.append(found)
        print(f"\r{first + count:,} of {args.count:,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    told = merged(pieces)
    print("\n".join(summary(told)))
    if failed(told):
        sys.exit(1)


if __name__ == "__main__":
    main()
