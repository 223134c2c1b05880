"""Schedules found from the command line: what is told, what is written, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from outcome import TINY, Run
from torch import Tensor

from tokencut.cli import search_run
from tokencut.cli.observer import CommandObserver
from tokencut.errors import TokencutError
from tokencut.profiling.latency import Timing
from tokencut.search import run as search
from tokencut.search import timing
from tokencut.search.latency_table import BlockTimes, LatencyTable

# 12 images, all in one batch but for the seeds' quarter; the dense model has 0.0019 GMACs.
QUICK = ("--search-effort", "6", "--device", "cpu")


@pytest.fixture
def gmacs(run: Run) -> float:
    """What the tiny model has at keep 0.5."""
    found = run("profile", *TINY, "--keep", "0.5", "--no-latency", "--json").json
    assert isinstance(found["compressed"]["gmacs"], float)
    return found["compressed"]["gmacs"]


def test_a_found_schedule_is_in_the_file(run: Run, pictures: Path, tmp_path: Path, gmacs: float) -> None:
    path = tmp_path / "out.safetensors"
    made = run("compress", *TINY, "--target-gmacs", gmacs, "--calibration", pictures, *QUICK, "-o", path, "--json")
    assert made.code == 0
    found = made.json["search"]["found"]
    assert made.json["gmacs"] == found["gmacs"] <= gmacs
    assert (made.json["keep"], made.json["layers"]) == (found["keep"], found["layers"])
    assert made.json["search"]["metric"] == "top1"
    assert made.json["search"]["images"] == 12
    assert run("info", path, "--json").json["recipe"]["keep"] == found["keep"]


@pytest.mark.slow
def test_another_point_of_the_front_can_be_typed(run: Run, pictures: Path, tmp_path: Path, gmacs: float) -> None:
    path = tmp_path / "out.safetensors"
    made = run("compress", *TINY, "--target-gmacs", gmacs, "--calibration", pictures, *QUICK, "-o", path)
    assert made.code == 0
    assert f"asked for        --target-gmacs {gmacs:g}, searched by 12 images of {pictures}" in made.out
    written = json.loads((tmp_path / "out.front.json").read_text())
    assert f"wrote {len(written['front'])} schedules to choose from to {tmp_path / 'out.front.json'}" in made.notes
    for point in (written["front"][0], written["front"][-1]):
        typed = run("profile", *TINY, *point["options"].split(), "--no-latency", "--json").json
        assert typed["compressed"]["gmacs"] == point["gmacs"]
        stages = {stage["block"]: stage["tokens_out"] for stage in typed["stages"]}
        assert stages == {block: point["tokens"][block - 1] for block in point["layers"]}


@pytest.mark.slow
def test_profile_writes_a_front_only_where_it_is_told(run: Run, pictures: Path, tmp_path: Path) -> None:
    words = ("profile", *TINY, "--max-drop", "70", "--calibration", pictures, *QUICK, "--no-latency", "--json")
    first = run(*words)
    assert first.code == 0
    assert first.json["search"]["front"] is None
    path = tmp_path / "front.json"
    path.write_text("mine")
    refused = run(*words, "--front", path)
    assert (refused.code, refused.err.splitlines()[-1].partition(";")[0]) == (1, f"error: {path} exists")
    assert path.read_text() == "mine"
    second = run(*words, "--front", path, "--force")
    assert second.json["search"]["found"] == first.json["search"]["found"]
    assert json.loads(path.read_text())["target"] == "--max-drop 70"


@pytest.mark.slow
def test_what_is_found_reads_well_for_one_image(run: Run, pictures: Path, gmacs: float) -> None:
    done = run("profile", *TINY, "--target-gmacs", gmacs, "--calibration", pictures, "--calibration-limit", "1", *QUICK,
               "--no-latency")  # fmt: skip
    assert done.code == 0
    assert f"--target-gmacs {gmacs:g}, searched by 1 image of {pictures}" in done.out
    assert re.search(r"\d\.\d\d points of \S+ on labels, as expected on other images; one image tells", done.out)


@pytest.mark.slow
def test_calibration_that_is_also_data_is_told_of(run: Run, pictures: Path, tmp_path: Path, gmacs: float) -> None:
    path = tmp_path / "out.safetensors"
    words = ("compress", *TINY, "--target-gmacs", gmacs, "--calibration", f"{pictures}/.", *QUICK, "-o", path)
    told = f"--calibration and --data are both {pictures}: an accuracy on images that the schedule was chosen by is too"
    assert any(note.startswith(told) for note in run(*words, "--data", pictures).notes)


def signal_when(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[str, Mapping[str, float]], bool]) -> None:
    """Sends one request to end, when the search tells of that for the first time."""
    progress, sent = CommandObserver.progress, []

    def told(observer: CommandObserver, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        progress(observer, task, done, total, values)
        if not sent and wanted(task, values):
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(CommandObserver, "progress", told)


@pytest.mark.slow
def test_interrupted_it_goes_on_with_the_best(
    run: Run, pictures: Path, tmp_path: Path, gmacs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_when(monkeypatch, lambda task, values: "gmacs" in values)
    path = tmp_path / "out.safetensors"
    made = run("compress", *TINY, "--target-gmacs", gmacs, "--calibration", pictures, *QUICK, "-o", path)
    assert made.code == 0
    first, second = (note for note in made.notes if "search" in note)
    assert first == "stopping the search: the best schedule so far is kept; Ctrl-C again stops at once"
    assert second == "the search was interrupted: going on with the best schedule so far"
    assert path.exists()
    assert (tmp_path / "out.front.json").exists()


def test_interrupted_before_it_has_anything_it_ends(
    run: Run, pictures: Path, tmp_path: Path, gmacs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_when(monkeypatch, lambda task, values: task == "reading the images")
    path = tmp_path / "out.safetensors"
    done = run("compress", *TINY, "--target-gmacs", gmacs, "--calibration", pictures, *QUICK, "-o", path)
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-2:] == [
        "note: stopping the search: nothing was found yet; Ctrl-C again stops at once",
        "error: interrupted",
    ]
    assert list(tmp_path.iterdir()) == []


def test_found_first_then_fine_tuned(run: Run, pictures: Path, tmp_path: Path, gmacs: float) -> None:
    path = tmp_path / "out.safetensors"
    made = run("compress", *TINY, "--target-gmacs", gmacs, "--calibration", pictures, *QUICK, "-o", path,
               "--finetune-epochs", "1", "--train-data", pictures, "-j", "0", "--json")  # fmt: skip
    assert made.code == 0
    assert made.json["finetune"]["epochs"] == 1
    assert made.json["keep"] == made.json["search"]["found"]["keep"]


def test_a_target_that_cannot_be_met_says_what_can(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    words = ("compress", *TINY, "--calibration", pictures, *QUICK, "-o", path)
    failed = run(*words, "--target-gmacs", "0.00001")
    assert failed.code == 1
    assert re.fullmatch(r"(note: .*\n)*error: --target-gmacs 1e-05 cannot be met: \S+ GMACs is the least that these "
                        r"blocks can reach; type --target-gmacs \S+\n", failed.err)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


HERE = ("--calibration", "PICTURES")


FORM = (
    "--target-form says how a target of seconds is timed; add --target-speedup 1.6 or --target-latency 20, or leave "
    "it out"
)
NO_FORM = (
    "invalid value for '--target-form': 'fast' is not one of eager, compiled, captured; type tokencut compress --help"
)
NO_TIME = (
    "invalid value for '--target-latency': 0 is not a number above 0 and up to 10000000, such as 20; "
    "type tokencut compress --help"
)
EXCLUDE = "--target-gmacs and --max-drop exclude each other; type one of them"
NO_IMAGES = (
    "--target-gmacs needs images to search by; add --calibration DIR, a folder with one sub-folder a class or a .tar "
    "of one, or --calibration digits"
)
NO_TARGET = (
    "--calibration is for finding a schedule; add a target, such as --target-gmacs 2.6, --target-speedup 1.6, "
    "--target-latency 20 or --max-drop 0.5"
)
KEEP = "--max-drop finds the keep rates and --keep gives them; type one of them"
REDUCE_BY = "--target-speedup finds the keep rates and --reduce-by gives them; type one of them"
SLOWER = (
    "invalid value for '--target-speedup': 0.9 is not a number above 1 and up to 1000, such as 1.6; "
    "type tokencut compress --help"
)
NO_NUMBER = (
    "invalid value for '--max-drop': 'much' is not a number above 0 and up to 100, such as 0.5; "
    "type tokencut compress --help"
)
NO_EFFORT = (
    "invalid value for '--search-effort': 0 is not a number above 0 and up to 10000, such as 40; "
    "type tokencut compress --help"
)
NO_SAMPLE = (
    "invalid value for '--calibration-limit': 0 is not a whole number from 1 to 1000000000, such as 512; "
    "type tokencut compress --help"
)
NO_JSON = "--front model.safetensors does not end in .json, and a front is written as JSON; type --front model.json"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target-gmacs", "1"), NO_IMAGES),
        (HERE, NO_TARGET),
        (("--target-gmacs", "1", "--max-drop", "1", *HERE), EXCLUDE),
        (("--max-drop", "1", "--keep", "0.5", *HERE), KEEP),
        (("--target-speedup", "2", "--reduce-by", "2", *HERE), REDUCE_BY),
        (("--target-speedup", "0.9", *HERE), SLOWER),
        (("--target-latency", "0", *HERE), NO_TIME),
        (("--target-latency", "5", "--max-drop", "1", *HERE), EXCLUDE.replace("--target-gmacs", "--target-latency")),
        (("--target-latency", "5", "--target-form", "fast", *HERE), NO_FORM),
        (("--target-gmacs", "1", "--target-form", "captured", *HERE), FORM),
        (("--keep", "0.5", "--target-form", "captured"), FORM),
        (("--max-drop", "much", *HERE), NO_NUMBER),
        (("--target-gmacs", "0.001", *HERE, "--search-effort", "0"), NO_EFFORT),
        (("--target-gmacs", "0.001", *HERE, "--calibration-limit", "0"), NO_SAMPLE),
        (("--target-gmacs", "0.001", *HERE, "--front", "model.safetensors"), NO_JSON),
    ],
)
def test_wrong_words(run: Run, pictures: Path, tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    typed = [str(pictures) if word == "PICTURES" else word for word in words]
    refused = run("compress", *TINY, *typed, "-o", tmp_path / "out.safetensors")
    assert refused.code == 2
    assert refused.err.splitlines()[-1] == f"error: {told}"


def machine(monkeypatch: pytest.MonkeyPatch, slower: float = 1.0) -> None:
    """A machine on which a token costs 1 ms in each of six blocks, and a stage 2 ms; or one that is slower."""
    block = BlockTimes(block=(0.001, 0.016), staged=(0.0025, 0.010), mlp_half=(0.0005, 0.008), fresh=0.016)
    table = LatencyTable((1, 16), (block,) * 6, 0.004, slower)

    def times(models: Mapping[str, Any], images: Tensor, **_: object) -> dict[str, Timing]:
        assert images.shape[0] == 8
        counts = {"dense": (16,) * 6}
        for name, model in models.items():
            if name != "dense":
                left = {stage.block: stage.tokens_out for stage in model.recipe.stages}
                counts[name] = tuple(
                    left[max(b for b in left if b <= n)] if min(left) <= n else 16 for n in range(1, 7)
                )
        return {name: Timing(ms, (ms, ms), 1.0) for name, ms in
                ((name, 1000 * table.seconds(left)) for name, left in counts.items())}  # fmt: skip

    monkeypatch.setattr(search, "latency_table", lambda *args, **kwargs: table)
    monkeypatch.setattr(timing, "measure", times)


@pytest.mark.slow
def test_a_target_of_milliseconds(run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    words = ("profile", *TINY, "--target-latency", "60", "--calibration", pictures, *QUICK, "-b", "8", "--no-latency")
    told = run(*words, "--json").json["search"]
    assert (told["target"], told["clock"]["form"], told["clock"]["batch_size"]) == ("--target-latency 60", "eager", 8)
    assert told["clock"]["dense_ms"] == 100.0
    assert told["clock"]["found_ms"] == pytest.approx(60, rel=0.05)
    assert told["speedup"] == pytest.approx(100 / told["clock"]["found_ms"])
    assert told["clock"]["table"]["kinds"][0]["stage_ms"] == [2.0, 2.0]
    lines = " ".join(run(*words).out.split())
    assert (
        f"speed-up {told['speedup']:.2f} x as fast as dense: 100 -> {told['clock']['found_ms']:.4g} ms a batch" in lines
    )
    assert "measured batches of 8 in fp32, eager, on " in lines


def test_milliseconds_out_of_reach(run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    words = ("profile", *TINY, "--calibration", pictures, *QUICK, "-b", "8", "--no-latency", "--target-latency")
    # One token from the first stage on: 4 ms for the ends, 10 and 0.5, then 5 blocks of 1 ms.
    failed = run(*words, "1")
    assert (failed.code, failed.err.splitlines()[-1]) == (
        1, "error: --target-latency 1 cannot be met: 19.5 ms a batch is the least (dense 100 ms) that these blocks can "
        "reach here; type --target-latency 20.5",
    )  # fmt: skip
    assert run(*words, "100").err.splitlines()[-1] == (
        "error: --target-latency 100 is met by the dense model, which takes 100 ms a batch here; type less, such as "
        "--target-latency 65"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("compress", "-o", "out.safetensors"), "type --target-form captured, or a larger --batch-size"),
        (("profile", "--no-latency"), "type --capture, or a larger --batch-size"),
    ],
)
def test_each_command_tells_the_form_by_its_own_option(
    run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise TokencutError("`speedup=2` cannot be met: type `capture=True`, or a larger `timing_batch_size`")

    monkeypatch.setattr(search_run, "find_schedule", refuse)
    command, *rest = words
    refused = run(command, *TINY, "--target-speedup", "2", "--calibration", pictures, *QUICK, *rest)
    assert (refused.code, refused.err.splitlines()[-1]) == (1, f"error: --target-speedup 2 cannot be met: {told}")


@pytest.mark.slow
def test_a_file_found_by_the_clock_holds_no_times(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for slower in (1.0, 2.0):
        machine(monkeypatch, slower)
        files.append(tmp_path / f"{slower}.safetensors")
        made = run("compress", *TINY, "--target-speedup", "1.6", "--calibration", pictures, *QUICK, "-b", "8", "-o",
                   files[-1], "--json")  # fmt: skip
        assert made.json["search"]["clock"]["dense_ms"] == 100 * slower
    first, second = files
    assert first.read_bytes() == second.read_bytes()


def test_an_exported_model_has_its_schedule(run: Run, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    refused = run("profile", path, "--target-gmacs", "1", "--calibration", pictures)
    assert refused.code == 2
    assert refused.err.startswith(f"error: {path} is exported, and its schedule fixed; find one for the model it was")


def test_several_processes_are_refused(pictures: Path) -> None:
    from tokencut.cli.options import RunOptions
    from tokencut.cli.search_options import TargetOptions
    from tokencut.errors import UsageError

    target = TargetOptions(target_gmacs=1.0, calibration=str(pictures))
    with pytest.raises(
        UsageError, match="^a search runs in one process, and torchrun started 2; type tokencut profile"
    ):
        search_run.requested_search(target, RunOptions(), front=None, force=True, processes=2)


@pytest.mark.slow
def test_profile_reads_calibration_images_as_data_are_read(run: Run, pictures: Path, tmp_path: Path) -> None:
    order = tmp_path / "map.txt"
    order.write_text("ant\nbee\ncow\n")
    words = ("profile", *TINY, "--max-drop", "70", "--calibration", pictures, *QUICK, "--no-latency", "--json")
    done = run(*words, "--class-map", order, "-j", "0")
    told = "calibration labels are not used: the class map lacks the class folders 'cat'; it holds 'ant', 'bee', 'cow'"
    assert (done.code, told in done.notes) == (0, True)
    refused = run("profile", "deit_tiny", "--no-latency", "--class-map", order, "--workers", "0")
    assert (refused.code, refused.err) == (
        2, "error: --class-map and --workers would say how calibration images are read, and none are; leave that out, "
        "or add a target and --calibration DIR\n",
    )  # fmt: skip
