"""Accuracies that are true: equal to timm's, of the images that are there, whatever the batch."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from image_files import encoded, picture, tar_of, write_folder
from PIL import Image
from timm.data import create_loader, resolve_model_data_config
from timm.data.dataset import ImageDataset
from torch import Tensor, nn

from tokencut.errors import ArtifactError, DataError, ModelError, UsageError
from tokencut.evaluation import EvaluationReport, Progress, evaluate

CLASSES = ["ant", "bee", "cow"]
CPU = torch.device("cpu")


def small_model(classes: int = 3, labels: list[str] | None = None) -> Any:
    """A ViT of 4 image tokens, random but always the same."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", img_size=32, num_classes=classes)
    if classes:  # a random head gives logits too alike to tell a wrong image by
        model.head.weight.data.mul_(20)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": labels}
    return model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads than processors are free make such small models slower by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Answers(nn.Module):
    """Answers each image, from its mean brightness, by given logits."""

    def __init__(self, answer: Callable[[Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.answer = answer
        self.num_classes = classes
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images.mean(dim=(1, 2, 3)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of eight images."""
    return write_folder(tmp_path / "set", CLASSES, 8)


def greys(root: Path, levels: dict[str, list[int]]) -> Path:
    """A folder with one plain grey PNG for each level of each class."""
    for name, values in levels.items():
        (root / name).mkdir(parents=True)
        for number, value in enumerate(values, 1):
            Image.new("RGB", (8, 8), (value,) * 3).save(root / name / f"{number}.png")
    return root


def plain_timm(model: nn.Module, root: Path, **options: Any) -> tuple[float, float, float]:
    """Top-1, top-5 and loss by timm's own dataset and loader, and as few lines as it takes."""
    config = resolve_model_data_config(model, **options)
    loader = create_loader(ImageDataset(str(root)), batch_size=7, num_workers=0, device=CPU, **config)
    top1 = top5 = images = 0
    loss = 0.0
    model.eval()
    with torch.no_grad():
        for batch, targets in loader:
            logits = model(batch)
            ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            top1 += int(ranked[:, 0].sum())
            top5 += int(ranked.any(dim=1).sum())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            images += len(targets)
    return 100 * top1 / images, 100 * top5 / images, loss / images


# timm leaves the files that it opened to the garbage collector.
timms_files = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@timms_files
@pytest.mark.parametrize("classes", [3, 7])
def test_equals_a_plain_timm_evaluation(tmp_path: Path, classes: int) -> None:
    names = [f"class{number}" for number in range(classes)]
    root = write_folder(tmp_path / "set", names, 6)
    report = evaluate(small_model(classes), root, batch_size=7, workers=0)
    top1, top5, loss = plain_timm(small_model(classes), root, args={"img_size": 32})
    assert (report.top1, report.top5) == (top1, top5)
    assert report.loss == pytest.approx(loss, rel=1e-6)
    assert report.images == 6 * classes
    assert 0 < report.top1 < 100
    assert (classes == 3) == (report.top5 == 100)


@timms_files
def test_equals_a_plain_timm_evaluation_of_a_real_model(shared: Path, tmp_path: Path) -> None:
    with tarfile.open(shared / "data" / "cifar10-val.tar") as archive:
        archive.extractall(tmp_path, archive.getmembers()[::25], filter="data")
    model = timm.create_model(f"local-dir:{shared / 'checkpoints' / 'cifar10_vit'}", pretrained=True)
    report = evaluate(model, tmp_path, workers=0)
    assert report.images == 200
    assert report.notes == ()
    assert report.top1 == plain_timm(model, tmp_path)[0]
    assert report.model == "vit_tiny_patch16_224.cifar10"


def test_figures_worked_out_by_hand(tmp_path: Path) -> None:
    # Black is answered with class 0, any other grey with class 1, by logits of 1 and 0.
    model = Answers(lambda level: torch.stack([level == 0, level > 0], dim=1).float(), 2)
    root = greys(tmp_path / "set", {"a": [0, 0, 9], "b": [9, 0]})
    report = evaluate(model, root, workers=0, gmacs=1.5, name="by hand")
    right, wrong = -1 + torch.tensor(1 + 2.718281828459045).log(), torch.tensor(1 + 2.718281828459045).log()
    assert report.correct == (True, True, False, True, False)
    assert (report.images, report.top1, report.top5) == (5, 60.0, 100.0)
    assert report.loss == pytest.approx(float(3 * right + 2 * wrong) / 5, rel=1e-6)
    assert (report.model, report.data, report.gmacs) == ("by hand", str(root), 1.5)
    assert report.images_per_second == pytest.approx(5 / report.seconds)


def test_top5_of_more_classes(tmp_path: Path) -> None:
    # The logits rank the classes 6, 5, ... 0 for every image.
    model = Answers(lambda level: torch.arange(7.0).expand(len(level), 7), 7)
    report = evaluate(model, greys(tmp_path / "set", {str(number): [9] for number in range(7)}), workers=0)
    assert report.top1 == pytest.approx(100 / 7)
    assert report.top5 == pytest.approx(500 / 7)


def test_of_equal_logits_the_lower_class_comes_first(tmp_path: Path) -> None:
    model = Answers(lambda level: torch.zeros(len(level), 40), 40)
    report = evaluate(model, greys(tmp_path / "set", {str(number): [9] for number in range(40)}), workers=0)
    assert report.correct == (True,) + (False,) * 39
    assert report.top5 == 100 * 5 / 40


def test_an_image_is_judged_alike_in_any_batch(folder: Path) -> None:
    reports = [evaluate(small_model(), folder, batch_size=size, workers=0) for size in (1, 7, 24)]
    assert len({report.correct for report in reports}) == 1
    assert reports[0].loss == pytest.approx(reports[2].loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_tar_read_by_workers_gives_the_same(folder: Path, tmp_path: Path) -> None:
    from_tar = evaluate(small_model(), tar_of(folder, tmp_path / "set.tar"), batch_size=5, workers=2)
    from_folder = evaluate(small_model(), folder, batch_size=5, workers=0)
    assert (from_tar.correct, from_tar.loss) == (from_folder.correct, from_folder.loss)


def test_folders_are_matched_by_name(folder: Path) -> None:
    labels = ["cow", "dog", "Bee", "ant"]
    report = evaluate(small_model(4, labels), folder, workers=0)
    assert report.notes == ("3 of the model's 4 classes are present",)
    renamed = folder.rename(folder.with_name("renamed"))
    for number, name in enumerate(labels):
        target = {"cow": "cow", "Bee": "bee", "ant": "ant"}.get(name)
        if target:
            (renamed / target).rename(renamed / f"{number}")
    (renamed / "1").mkdir()
    assert sorted(evaluate(small_model(4), renamed, workers=0).correct) == sorted(report.correct)


def test_a_limit_takes_an_evenly_spread_sample(folder: Path) -> None:
    everything = evaluate(small_model(), folder, workers=0)
    sample = evaluate(small_model(), folder, workers=0, limit=6)
    assert sample.correct == everything.correct[::4]
    assert "an evenly spread sample of 6 of 24 images" in sample.notes


def test_the_bundled_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    report = evaluate(small_model(10), "digits", limit=20, workers=0)
    assert (report.images, report.data) == (20, "digits")


def test_a_few_unreadable_images_are_named_and_skipped(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 99, "b": [9] * 101})
    (root / "a/7.png").write_text("no image")
    (root / "b/9.png").write_bytes(encoded(picture(1))[:-100])
    model = Answers(lambda level: torch.stack([level == 0, level > 0], dim=1).float(), 2)
    report = evaluate(model, root, workers=0, batch_size=7)
    assert (report.images, report.top1, len(report.correct)) == (198, 100.0, 198)
    assert report.unreadable == ("a/7.png", "b/9.png")
    assert report.notes[-1] == "images skipped, since they could not be decoded: 2 of 200 ('a/7.png', 'b/9.png')"


def test_more_than_one_percent_unreadable_ends_with_an_error(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 99, "b": [9] * 101})
    for number in range(20, 24):
        (root / f"a/{number}.png").write_text("no image")
    model = Answers(lambda level: torch.stack([level, level], dim=1), 2)
    with pytest.raises(DataError) as caught:
        evaluate(model, root, workers=0)
    reason = "not a JPEG, PNG, WEBP, BMP or TIFF image"
    assert str(caught.value) == (
        f"at least 4 of 200 images in '{root}' cannot be decoded, and at most 1 % may be: 'a/20.png' ({reason}), "
        f"'a/21.png' ({reason}), 'a/22.png' ({reason}); mend or remove them and run this again"
    )


def test_a_batch_of_nothing_but_unreadable_images_is_survived(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a": [0] * 100, "b": [9] * 100})
    (root / "a/1.png").write_text("no image")
    model = Answers(lambda level: torch.stack([level == 0, level > 0], dim=1).float(), 2)
    assert evaluate(model, root, workers=0, batch_size=1).images == 199


def test_odd_images_are_judged(tmp_path: Path) -> None:
    root = tmp_path / "set"
    odd = {
        "pixel.png": Image.new("RGB", (1, 1), "red"),
        "cmyk.jpg": picture(1).convert("CMYK"),
        "deep.png": Image.new("I;16", (20, 30), 40000),
        "palette.png": picture(2).convert("P"),
        "clear.webp": picture(3).convert("RGBA"),
    }
    (root / "a").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a/notes.txt").write_text("text")
    for name, image in odd.items():
        image.save(root / "a" / name)
    report = evaluate(small_model(2), root, workers=0)
    assert report.images == 5
    assert report.notes == (
        "files passed over for their extension: 1 ('a/notes.txt')",
        "class folders without images: 1 ('empty')",
        "the model has no label names: the 2 folders stand for the model's classes in natural order",
    )


def test_predictions_are_written_by_name(tmp_path: Path) -> None:
    root = greys(tmp_path / "set", {"a, b": [0, 9], "c": [9]})
    model = Answers(lambda level: torch.stack([level == 0, level > 0], dim=1).float(), 2)
    path = tmp_path / "out.csv"
    path.write_text("old")
    evaluate(model, root, workers=0, predictions=path)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "label", "top1", "top2"],
            ["a, b/1.png", "a, b", "a, b", "c"],
            ["a, b/2.png", "a, b", "c", "a, b"],
            ["c/1.png", "c", "c", "a, b"],
        ]


def test_predictions_hold_five_classes_in_the_models_words(folder: Path, tmp_path: Path) -> None:
    labels = ["cow", "dog", "Bee", "ant", "eel", "fox"]
    report = evaluate(small_model(6, labels), folder, workers=0, predictions=tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "top1", "top2", "top3", "top4", "top5"]
    assert tuple(row["label"] == row["top1"] for row in rows) == report.correct
    assert {row["label"] for row in rows} == {"cow", "Bee", "ant"}


def test_a_folder_for_predictions_must_exist_before_anything_is_done(folder: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with pytest.raises(ArtifactError, match="does not exist"):
        evaluate(small_model(), folder, predictions=tmp_path / "no/out.csv", on_progress=seen.append)
    assert not seen


def test_a_failed_evaluation_writes_no_predictions(folder: Path, tmp_path: Path) -> None:
    model = Answers(lambda level: level[:, None] * float("nan") * torch.ones(3), 3)
    with pytest.raises(ModelError):
        evaluate(model, folder, workers=0, predictions=tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_progress_is_told_after_each_batch(folder: Path) -> None:
    seen: list[Progress] = []
    report = evaluate(small_model(), folder, batch_size=10, workers=0, on_progress=seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(10, 24), (20, 24), (24, 24)]
    assert seen[-1].top1 == report.top1
    assert seen[0].top1 == 10 * sum(report.correct[:10])
    assert all(progress.images_per_second > 0 for progress in seen)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_are_close(folder: Path, precision: str) -> None:
    model = small_model()
    report = evaluate(model, folder, workers=0, precision=precision)
    exact = evaluate(model, folder, workers=0)
    assert report.loss != exact.loss
    assert report.loss == pytest.approx(exact.loss, rel=0.05)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_model_in_half_precision_is_taken_as_it_is(folder: Path) -> None:
    model = small_model().to(torch.bfloat16)
    assert evaluate(model, folder, workers=0).images == 24
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_gives_much_the_same(folder: Path, precision: str) -> None:
    there = evaluate(small_model(), folder, workers=0, device="cuda", precision=precision)
    here = evaluate(small_model(), folder, workers=0, device="cpu")
    assert there.loss == pytest.approx(here.loss, rel=0.05)
    assert len(there.correct) == len(here.correct)


def test_the_model_and_the_random_numbers_stay_as_they_are(folder: Path) -> None:
    model = small_model().train()
    model.blocks[0].eval()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    evaluate(model, folder, workers=0, precision="bf16")
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("precision", "advice"), [("fp32", "check its weights with tokencut info FILE"), ("fp16", "type --precision fp32")]
)
def test_logits_that_are_not_finite_are_an_error(folder: Path, precision: str, advice: str) -> None:
    model = Answers(lambda level: level[:, None] * torch.tensor([1.0, float("inf"), 0.0]), 3)
    with pytest.raises(ModelError) as caught:
        evaluate(model, folder, workers=0, precision=precision)
    assert str(caught.value) == f"the model gives logits that are not finite numbers in {precision}; {advice}"


def test_a_model_without_a_head_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="test_vit has no classification head"):
        evaluate(small_model(0), folder)


@pytest.mark.parametrize(
    "options", [{"device": "gpu"}, {"precision": "fp8"}, {"limit": 0}, {"batch_size": 0}, {"workers": -1}]
)
def test_options_out_of_range(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        evaluate(small_model(), folder, **options)


def test_folders_that_match_no_class_are_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="'ant', 'bee', 'cow' match none of its label names"):
        evaluate(small_model(4, ["a", "b", "c", "d"]), folder)


def test_the_report_becomes_json(folder: Path) -> None:
    report = evaluate(small_model(), folder, workers=0, gmacs=0.25)
    values = json.loads(json.dumps(report.to_dict()))
    assert list(values) == [
        *("model", "data", "images", "top1", "top5", "loss", "gmacs", "seconds", "images_per_second"),
        *("unreadable", "notes"),
    ]
    assert values["model"] == "test_vit.r160_in1k"
    assert values["top1"] == report.top1
    with pytest.raises(FrozenInstanceError):
        report.top1 = 100.0  # type: ignore[misc]
    assert isinstance(report, EvaluationReport)


INTERRUPTED = """
import sys, time, torch, timm
from tokencut.evaluation import evaluate
model = timm.create_model("test_vit", img_size=32, num_classes=3)
try:
    evaluate(
        model, sys.argv[1], batch_size=1, workers=2, on_progress=lambda _: (print("started", flush=True), time.sleep(1))
    )
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals a process group")
def test_an_interrupt_ends_the_workers_too(folder: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, signal.SIGINT)
        try:
            errors = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, "")  # the workers have nothing to say
    deadline = time.monotonic() + 10
    while _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_lives(process.pid)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
