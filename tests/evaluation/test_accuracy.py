"""Accuracies that are true: equal to timm's, of the images that are there, whatever the batch and the precision."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from image_files import greys, tar_of, write_folder
from judged_models import Answers, black_or_not, small_model
from timm.data import create_loader, resolve_model_data_config
from timm.data.dataset import ImageDataset
from torch import nn

from tokencut.evaluation.accuracy import evaluate

CLASSES = ["ant", "bee", "cow"]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of eight images."""
    return write_folder(tmp_path / "set", CLASSES, 8)


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
        for member in archive.getmembers()[::50]:
            path, content = tmp_path / member.name, archive.extractfile(member)
            assert content is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    model = timm.create_model(f"local-dir:{shared / 'checkpoints' / 'cifar10_vit'}", pretrained=True)
    report = evaluate(model, tmp_path, workers=0)
    assert report.images == 100
    assert report.notes == ()
    assert report.top1 == plain_timm(model, tmp_path)[0]
    assert report.model == "vit_tiny_patch16_224.cifar10"


def test_figures_worked_out_by_hand(tmp_path: Path) -> None:
    model = black_or_not()
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
    (renamed / "1").mkdir()  # a folder without images
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


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_other_precisions_cast_the_weights_and_are_close(folder: Path, precision: str, dtype: torch.dtype) -> None:
    model = small_model()
    report = evaluate(model, folder, workers=0, precision=precision)
    exact = evaluate(model, folder, workers=0)
    assert report.loss != exact.loss
    assert report.loss == pytest.approx(exact.loss, rel=0.05)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert report.loss == evaluate(model.to(dtype), folder, workers=0).loss


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
