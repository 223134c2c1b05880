"""Sweeps: figures equal to those of single evaluations, each row once, and going on where one was interrupted."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_files import encoded, picture, write_folder
from observing import Seen

from tokencut.cost import total
from tokencut.data import loading
from tokencut.errors import ArtifactError, DataError, TokencutError, UsageError
from tokencut.evaluation.accuracy import evaluate
from tokencut.evaluation.statistics import paired_difference
from tokencut.model import CompressedModel, compress, predicted_macs
from tokencut.profiling.latency import Timing
from tokencut.sweeping import run as sweeping
from tokencut.sweeping import writing
from tokencut.sweeping.report import SweepReport
from tokencut.sweeping.run import SweepPlan, sweep

pytest.importorskip("matplotlib")

CLASSES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plots and pictures (test_sweep_report and test_sweep_picture draw some), and one thread, since more make such
    small models slower.
    """
    monkeypatch.setattr(sweeping, "picture_of", lambda *_, **__: None)
    monkeypatch.setattr(sweeping, "tiles_of", lambda *_, **__: None)
    monkeypatch.setattr(writing, "_plot", lambda *_, **__: None)
    monkeypatch.setattr(writing, "save_figure", lambda figure, stem: stem.with_suffix(".png").touch())
    monkeypatch.setattr(writing, "svg_of", lambda figure: "<svg/>")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of eight images."""
    return write_folder(tmp_path / "set", CLASSES, 8)


def small_model(seed: int = 0) -> Any:
    """A ViT of 16 image tokens, random but always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = timm.create_model("test_vit", img_size=64, num_classes=3)
    model.head.weight.data.mul_(20)  # a random head gives logits too alike to tell a wrong image by
    return model


def plan(**changes: Any) -> SweepPlan:
    return SweepPlan(**{
        "methods": ("bat", "topk"), "keeps": (0.5, 0.25), "layers": (2, 4), "batch_size": 7, "workers": 0,
        "device": "cpu", "latency": False, **changes,
    })  # fmt: skip


class Counter(Seen):
    """Counts the rows that are judged; interrupts in the middle of one of them if asked to."""

    def __init__(self, stop_in: int | None = None) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.stop_in = stop_in

    def progress(self, task: str, done: float, total: float, values: Mapping[str, float]) -> None:
        if "top1" not in values:
            return
        if not self.rows or self.rows[-1] != task:
            self.rows.append(task)
        if len(self.rows) == self.stop_in:
            raise KeyboardInterrupt


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for the clock, so that no test waits for it; a list of what was timed together."""
    sessions: list[list[str]] = []

    def measure(models: dict[str, Any], batch: torch.Tensor, **options: Any) -> dict[str, Timing]:
        assert batch.shape == (7, 3, 64, 64)
        assert all(model(batch).shape == (7, 3) for model in models.values())
        sessions.append(list(models))
        options["observer"].progress(options["task"], 1, 1, {})
        return {name: Timing(10.0 * place, (9.0 * place, 11.5 * place), 0.7 / place) for place, name in
                enumerate(models, start=1)}  # fmt: skip

    monkeypatch.setattr(sweeping, "measure", measure)
    return sessions


def test_rows_equal_single_evaluations(images: Path, tmp_path: Path) -> None:
    model = small_model()
    report = sweep(model, images, tmp_path / "report", plan())
    assert [(row.method, row.keep) for row in report.rows] == [
        ("dense", 1.0), ("bat", 0.5), ("topk", 0.5), ("bat", 0.25), ("topk", 0.25),
    ]  # fmt: skip
    dense, *reduced = report.rows
    alone = evaluate(model, images, batch_size=7, workers=0, device="cpu")
    assert (dense.top1, dense.top5, dense.loss, dense.correct) == (alone.top1, alone.top5, alone.loss, alone.correct)
    assert 0 < dense.top1 < 100
    for row in reduced:
        made = compress(model, keep=row.keep, layers=(2, 4), method=row.method)
        found = evaluate(made, images, batch_size=7, workers=0, device="cpu")
        assert (row.top1, row.loss, row.correct) == (found.top1, found.loss, found.correct)
        assert row.gmacs == total(predicted_macs(made)) / 1e9 < dense.gmacs
        assert row.to_dense == paired_difference(found.correct, alone.correct)
    assert len({row.loss for row in report.rows}) == 5
    assert (report.model, report.data, report.images, report.layers) == ("test_vit", str(images), 24, (2, 4))
    assert [(one.second, one.keep) for one in report.comparisons] == [("topk", 0.5), ("topk", 0.25), ("topk", None)]
    assert report.notes == alone.notes


def test_the_files_hold_the_contracts_keys(images: Path, tmp_path: Path) -> None:
    sweep(small_model(), images, tmp_path / "report", plan(keeps=((0.5, 0.25), 0.5)))
    rows = json.loads((tmp_path / "report" / "results.json").read_text())
    assert set(rows[0]) >= {"method", "keep", "gmacs", "top1", "top5", "images_per_second"}
    assert (rows[0]["method"], rows[0]["keep"]) == ("dense", 1.0)
    assert rows[1]["keep"] == [0.5, 0.25]
    with (tmp_path / "report" / "results.csv").open(newline="") as file:
        assert [row["keep"] for row in csv.DictReader(file)] == ["1.0", "0.5/0.25", "0.5/0.25", "0.5", "0.5"]
    made = {path.name for path in (tmp_path / "report").iterdir()}
    assert made == {"results.csv", "results.json", "table.md", "index.html", "state.json", "top1-gmacs.png"}


def test_the_model_stays_as_it_is_and_is_not_copied(images: Path, tmp_path: Path) -> None:
    model = small_model().train()
    model.blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    sweep(model, images, tmp_path / "report", plan())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_images_are_decoded_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    real = loading.decode
    monkeypatch.setattr(loading, "decode", lambda file, mode, **how: log.append(mode) or real(file, mode, **how))
    held = sweep(small_model(), images, tmp_path / "held", plan())
    assert len(log) == 24
    streamed = sweep(small_model(), images, tmp_path / "streamed", plan(held_bytes=0))
    assert len(log) == 24 + 5 * 24
    assert streamed.rows == held.rows


def test_an_interrupted_sweep_goes_on_where_it_was(images: Path, tmp_path: Path) -> None:
    whole = sweep(small_model(), images, tmp_path / "whole", plan())
    first, second = Counter(stop_in=3), Counter()
    with pytest.raises(KeyboardInterrupt):
        sweep(small_model(), images, tmp_path / "report", plan(), observer=first)
    assert first.rows == ["the dense model", "bat, keep 0.5", "topk, keep 0.5"]
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["state.json"]
    report = sweep(small_model(), images, tmp_path / "report", plan(), observer=second)
    assert second.rows == ["topk, keep 0.5", "bat, keep 0.25", "topk, keep 0.25"]
    assert second.notes == [f"2 of 5 rows were finished before and are taken from {tmp_path / 'report'}"]
    assert (report.rows, report.comparisons) == (whole.rows, whole.comparisons)


def test_an_interrupt_before_the_first_row_leaves_nothing(images: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(small_model(), images, tmp_path / "report", plan(), observer=Counter(stop_in=1))
    assert not (tmp_path / "report").exists()


def test_a_finished_sweep_judges_nothing_and_a_wider_one_what_is_new(images: Path, tmp_path: Path) -> None:
    again, wider = Counter(), Counter()
    before = sweep(small_model(), images, tmp_path / "report", plan())
    assert sweep(small_model(), images, tmp_path / "report", plan(), observer=again).rows == before.rows
    assert again.rows == []
    report = sweep(small_model(), images, tmp_path / "report", plan(methods=("topk", "tome", "bat")), observer=wider)
    assert wider.rows == ["tome, keep 0.5", "tome, keep 0.25"]
    assert len(report.rows) == 7


@pytest.mark.parametrize("changes", [{"keeps": (0.25,)}, {"methods": ("topk", "tome"), "keeps": (0.5, 0.25)}])
def test_a_report_loses_no_rows_unless_told_to(images: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "report"
    sweep(small_model(), images, folder, plan())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ArtifactError) as caught:
        sweep(small_model(), images, folder, plan(**changes))
    missing = "bat, keep 0.5; topk, keep 0.5" if "methods" not in changes else "bat, keep 0.5; bat, keep 0.25"
    assert str(caught.value) == (
        f"{folder} holds rows that a report of this sweep would lack ({missing}): name those methods and keep rates "
        f"too, add `force=True` to drop them and start again, or give another folder, such as `folder='{folder}-2'`"
    )
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(sweep(small_model(), images, folder, plan(**changes), force=True).rows) == len(changes["keeps"]) * 2 + 1


def test_an_interrupted_sweep_has_no_report_to_lose(images: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(small_model(), images, tmp_path / "report", plan(), observer=Counter(stop_in=4))
    assert len(sweep(small_model(), images, tmp_path / "report", plan(keeps=(0.25,))).rows) == 3


def change_an_image(images: Path) -> None:
    (images / "bee" / "3.jpg").write_bytes(encoded(picture(99)))


@pytest.mark.parametrize(
    ("changes", "seed", "prepare", "what"),
    [
        ({}, 1, None, "other weights"),
        ({}, 0, change_an_image, "other images"),
        ({"limit": 12}, 0, None, "other images"),
        ({"precision": "bf16"}, 0, None, "other precision (fp32, not bf16)"),
        ({"layers": (2, 5)}, 0, None, "other layers ((2, 4), not (2, 5))"),
        ({"prop_attn": False}, 0, None, "other proportional attention (by method, not off)"),
    ],
)
def test_rows_of_another_sweep_are_not_taken(
    images: Path, tmp_path: Path, changes: dict[str, Any], seed: int, prepare: Callable[[Path], None] | None, what: str
) -> None:
    folder = tmp_path / "report"
    few = {"methods": ("bat",), "keeps": (0.5,)}
    sweep(small_model(), images, folder, plan(**few))
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    if prepare:
        prepare(images)
    with pytest.raises(ArtifactError) as caught:
        sweep(small_model(seed), images, folder, plan(**few, **changes))
    assert str(caught.value) == (
        f"{folder} holds rows made with {what}; add `force=True` to drop them and start again, or give another "
        f"folder, such as `folder='{folder}-2'`"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    judged = Counter()
    sweep(small_model(seed), images, folder, plan(**few, **changes), force=True, observer=judged)
    assert judged.rows == ["the dense model", "bat, keep 0.5"]


def test_another_version_of_tokencut_takes_no_rows(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(small_model(), images, tmp_path / "report", plan(methods=("topk",), keeps=(0.5,)))
    monkeypatch.setattr("tokencut.runtime.devices.__version__", "99")
    with pytest.raises(ArtifactError, match="made with other versions; add `force=True`"):
        sweep(small_model(), images, tmp_path / "report", plan(methods=("topk",), keeps=(0.5,)))


def test_a_method_whose_defaults_changed_takes_no_rows(images: Path, tmp_path: Path) -> None:
    folder, few = tmp_path / "report", plan(methods=("bat",), keeps=(0.5,))
    sweep(small_model(), images, folder, few)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"weights":"size"', '"weights":"attention"'))
    with pytest.raises(ArtifactError, match=r"made with other reduction options \(bat, keep 0.5\); add `force=True`"):
        sweep(small_model(), images, folder, few)


def test_speeds_are_measured_last_and_together(images: Path, tmp_path: Path, timings: list[list[str]]) -> None:
    timed = plan(methods=("bat", "bat:preset=paper"), keeps=(0.5,), latency=True)
    report = sweep(small_model(), images, tmp_path / "report", timed)
    assert timings == [["the dense model", "bat, keep 0.5", "bat:preset=paper, keep 0.5"]]
    assert [row.images_per_second for row in report.rows] == [0.7, 0.35, pytest.approx(0.7 / 3)]
    assert report.rows[1].images_per_second_quartiles == (pytest.approx(7 / 0.023), pytest.approx(7 / 0.018))
    assert (tmp_path / "report" / "top1-speed.png").exists()


def test_speeds_are_measured_again_for_other_models_or_batches_only(
    images: Path, tmp_path: Path, timings: list[list[str]]
) -> None:
    def run(**changes: Any) -> SweepReport:
        changed = {"methods": ("bat",), "keeps": (0.5,), "latency": True, **changes}
        return sweep(small_model(), images, tmp_path / "report", plan(**changed))

    run()
    again = run()
    assert len(timings) == 1
    assert again.timed
    assert run(latency=False).timed  # what was measured stays in the report
    assert len(timings) == 1
    for changes in ({"methods": ("bat", "topk")}, {"batch_size": 5}):
        with pytest.raises(ArtifactError) as caught:
            run(latency=False, **changes)
        assert str(caught.value) == (
            f"{tmp_path / 'report'} holds speeds, which a report of this sweep would lack; leave out `latency=False`, "
            f"or give another folder, such as `folder={str(tmp_path / 'report-2')!r}`"
        )
    run(methods=("bat", "topk"))
    assert timings[1] == ["the dense model", "bat, keep 0.5", "topk, keep 0.5"]
    run(methods=("topk", "bat"))
    assert len(timings) == 2


def test_a_busy_machine_is_noted(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(models: dict[str, Any], batch: torch.Tensor, **options: Any) -> dict[str, Timing]:
        return dict.fromkeys(models, Timing(10.0, (8.0, 12.5), 700.0))

    monkeypatch.setattr(sweeping, "measure", measure)
    report = sweep(small_model(), images, tmp_path / "report", plan(methods=("bat",), keeps=(0.5,), latency=True))
    # Quartiles of 7 / 0.0125 = 560 and 7 / 0.008 = 875 images per second, around 700.
    assert report.notes[-1] == (
        "times differ by 45% from round to round, so this machine has other work; speeds say little"
    )


def test_a_real_clock_gives_speeds_of_this_machine(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "TIMING_SECONDS", 0.01)
    fast = plan(methods=("topk",), keeps=(0.25,), latency=True, limit=3)
    for row in sweep(small_model(), images, tmp_path / "report", fast).rows:
        assert row.images_per_second_quartiles is not None
        low, high = row.images_per_second_quartiles
        assert 0 < low <= row.images_per_second <= high


@pytest.mark.gpu
@pytest.mark.parametrize("held_bytes", [0, 2**20])
def test_a_gpu_gives_much_the_same(images: Path, tmp_path: Path, held_bytes: int) -> None:
    there = plan(device="cuda", precision="bf16", latency=True, held_bytes=held_bytes)
    found = sweep(small_model(), images, tmp_path / "there", there)
    here = sweep(small_model(), images, tmp_path / "here", plan())
    assert [row.loss for row in found.rows] == pytest.approx([row.loss for row in here.rows], rel=0.1)
    assert found.timed


def test_progress_tells_what_is_running_and_what_is_left(
    images: Path, tmp_path: Path, timings: list[list[str]]
) -> None:
    seen = Seen()
    done = sweep(
        small_model(), images, tmp_path / "report", plan(methods=("bat",), keeps=(0.5,), latency=True),
        observer=seen,
    )  # fmt: skip
    reading = [now for now in seen.told if now.task == "reading the images"]
    assert [(now.done, now.total) for now in reading] == [(count, 24) for count in range(1, 25)]
    judging = [now for now in seen.told if "top1" in now.values]
    assert [now.done for now in judging] == [7, 14, 21, 24, 31, 38, 45, 48]
    assert {(now.task, now.values["rows_left"], now.total) for now in judging} == {
        ("the dense model", 2, 48), ("bat, keep 0.5", 1, 48),
    }  # fmt: skip
    assert judging[-1].values["top1"] == done.rows[1].top1
    assert seen.told[-1] == ("timing all models in turn", 1, 1, {})


def test_unreadable_images_are_left_out_of_every_row(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "set", CLASSES, 40)
    (images / "bee" / "3.jpg").write_bytes(b"no image")
    report = sweep(small_model(), images, tmp_path / "report", plan(methods=("topk",), keeps=(0.5,)))
    assert {row.images for row in report.rows} == {119}
    assert report.notes[-1] == "images skipped, since they could not be decoded: 1 of 120 ('bee/3.jpg')"
    (images / "bee" / "4.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="at most 1 % may be"):
        sweep(small_model(), images, tmp_path / "other", plan())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keeps": ()}, "no keep rate given; type `keeps=[0.9, 0.7, 0.5]`"),
        ({"keeps": (0.5, 0.25, 0.5)}, "keep 0.5 is given twice; type `keeps=[0.5, 0.25]`"),
        ({"keeps": (1.5,)}, "keep 1.5 is not in (0, 1]; it is the fraction of tokens that stay, such as `keep=0.7`"),
        ({"methods": ("dyvit",)}, "method dyvit means nothing before it is fine-tuned, so it cannot be compared; "
            "leave it out of `methods`, and type `tokencut.evaluate` where its stages are trained"),
        ({"batch_size": 0}, "`batch_size=0` is not a whole number from 1 to 65536; type `batch_size=64`"),
        ({"precision": "fp8"}, "unknown precision 'fp8', expected fp32, bf16 or fp16; type `precision='bf16'`"),
    ],
)  # fmt: skip
def test_plans_that_are_refused(images: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        sweep(small_model(), images, tmp_path / "report", plan(**changes))
    assert str(caught.value) == message
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_nothing_is_begun(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TokencutError, match="pip install 'tokencut\\[plot\\]'"):
        sweep(small_model(), tmp_path / "no images", tmp_path / "report")


def test_all_rows_share_one_set_of_weights(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[Any] = []

    class Wrapped(CompressedModel):
        def __init__(self, model: Any, recipe: Any) -> None:
            wrapped.append(model)
            super().__init__(model, recipe)

    monkeypatch.setattr(sweeping, "CompressedModel", Wrapped)
    model = small_model()
    sweep(model, images, tmp_path / "report", plan())
    assert [one is model for one in wrapped] == [True] * 4


def test_notes_in_the_page_are_worded_as_asked(images: Path, tmp_path: Path) -> None:
    words: list[str] = []

    def wording(note: str) -> str:
        words.append(note)
        return f"as typed: {note}"

    report = sweep(small_model(), images, tmp_path / "report", plan(methods=("bat",), keeps=(0.5,)), wording=wording)
    assert words
    assert report.notes == tuple(f"as typed: {note}" for note in words)
    assert "as typed: " in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
