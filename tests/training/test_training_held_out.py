"""Training images held out: how many, what counts as harm, and that a fine-tune that does harm changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from observing import Seen
from timm.utils import ModelEmaV3
from training_runs import WILD, model, run, same, setup, stop_after, weights

from tokencut.data.sources import Source, Subset, hold_out, open_source
from tokencut.evaluation.accuracy import evaluate
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress
from tokencut.models import digits
from tokencut.training import held_out
from tokencut.training.held_out import compared, guard_size
from tokencut.training.recipe import SHORT

HARMFUL, HARMLESS = SHORT.changed(epochs=1, lr=0.3, min_lr=1.0), SHORT.changed(epochs=1, lr=1e-7)


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> Source:
    """200 training digits, of which 40 are held out."""
    monkeypatch.setattr(held_out, "GUARD_LEAST", 40)
    monkeypatch.setattr(held_out, "GUARD_LARGEST_SHARE", 0.2)
    return Subset(open_source("digits", split="train"), range(200))


def trained_digits() -> CompressedModel:
    """The bundled model, which is right on nearly all digits, at a keep rate of a half."""
    return compress(digits.create(), keep=0.5)


@pytest.mark.parametrize(
    ("images", "count"),
    [(1, 0), (3_999, 0), (4_000, 400), (8_000, 400), (10_000, 500), (40_000, 2_000), (1_281_167, 2_000)],
)
def test_how_many_images_are_held_out(images: int, count: int) -> None:
    assert guard_size(images) == count


def test_harm_is_clear_and_paired_by_hand() -> None:
    before = dict.fromkeys(range(100), True)
    lost = {number: number >= 10 for number in range(100)}
    found = compared(before, lost)
    # Ten of a hundred lost: s = 100 * sqrt(0.1 * 0.9 / 99) = 3.015.
    assert (found.images, found.before, found.after, found.difference.points) == (100, 100.0, 90.0, -10.0)
    assert found.difference.standard_error == pytest.approx(3.0151, abs=1e-4)
    assert (found.is_worse, found.kept) == (True, "before")
    assert not compared(lost, before).is_worse
    # Four of a hundred, s = 1.97: just beyond two of them; three are not.
    assert compared(before, {number: number >= 4 for number in range(100)}).is_worse
    assert not compared(before, {number: number >= 3 for number in range(100)}).is_worse


def test_only_images_that_were_judged_both_times_count() -> None:
    found = compared({1: True, 2: False, 3: True, 4: True}, {4: False, 2: True, 1: True, 9: True})
    assert (found.images, found.difference.points) == (3, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"select": "best"}, {"precision": "bf16"}],
    ids=lambda changes: next(iter(changes.values()), "plain"),
)
def test_a_fine_tune_that_harms_leaves_the_model_as_it_was(some: Source, changes: dict[str, Any]) -> None:
    trained = trained_digits()
    before = weights(trained)
    report = run(trained, some, HARMFUL, setup=setup(batch_size=20, seed=3, **changes))
    assert same(before, weights(trained))
    found = report.held_out
    assert (report.finished, report.chosen, found is not None) == (True, 0, True)
    assert found is not None
    images = 20 if "select" in changes else 40
    assert (found.images, found.kept) == (images, "before")
    assert report.notes == (
        f"the fine-tune did harm: top-1 on {images} training images held out went from {found.before:.2f} to "
        f"{found.after:.2f} % ({found.difference}), so the weights from before are kept; type `lr=0.03`",
    )
    # The seeded part, judged as users judge.
    part = hold_out(some, images / 200, 3)[1]
    assert found.before == pytest.approx(evaluate(
        trained, part, workers=0, device="cpu", batch_size=20, precision=changes.get("precision", "fp32")
    ).top1)  # fmt: skip


def test_a_fine_tune_that_does_not_harm_is_the_result(some: Source) -> None:
    trained = trained_digits()
    before = weights(trained)
    seen = Seen()
    report = run(trained, some, HARMLESS, setup=setup(batch_size=20), observer=seen)
    assert seen.notes[0] == "40 of 200 training images are held out, to know whether the fine-tune does harm"
    assert not same(before, weights(trained))
    assert report.held_out is not None
    assert (report.chosen, report.held_out.kept, report.notes) == (1, "after", ())
    assert seen.epochs == [(1, 8)]  # of 160 images


def test_what_is_judged_last_is_the_running_average(some: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelEmaV3, "update", lambda ema, trained, step: None)  # stays where it began
    report = run(trained_digits(), some, dataclasses.replace(HARMFUL, ema_decay=0.9), setup=setup(batch_size=20))
    assert report.held_out is not None
    assert report.held_out.before == report.held_out.after
    assert report.chosen == 1


@pytest.mark.parametrize("recipe", [HARMFUL, dataclasses.replace(WILD, lr=1e-7, beta=0.0)], ids=["harmful", "harmless"])
@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.slow
def test_a_run_that_was_stopped_comes_to_the_same(some: Source, tmp_path: Path, recipe: Any, steps: int) -> None:
    whole, cut, resumed = trained_digits(), trained_digits(), trained_digits()
    how = setup(batch_size=20)
    expected = run(whole, some, recipe, setup=how)
    assert not run(cut, some, recipe, setup=how, state=tmp_path, observer=stop_after(steps)).finished
    found = run(resumed, some, recipe, setup=how, state=tmp_path, resume=True)
    assert same(weights(whole), weights(resumed))
    assert (found.held_out, found.chosen) == (expected.held_out, expected.chosen)
    assert expected.held_out is not None
    assert expected.held_out.kept == ("before" if recipe is HARMFUL else "after")
    assert same(weights(trained_digits()), weights(resumed)) == (recipe is HARMFUL)


def test_a_new_head_and_too_few_images_are_not_guarded(some: Source, few: Source) -> None:
    seen = Seen()
    report = run(model(), some, HARMLESS, setup=setup(new_head=True), observer=seen)
    assert (report.held_out, report.history[0]["updates"]) == (None, 25)  # of all 200 images
    assert not any("held out" in note or "hold" in note for note in seen.notes)
    seen.notes.clear()
    assert run(model(), few, HARMLESS, observer=seen).held_out is None
    assert seen.notes[0] == (
        "40 training images are too few to hold some out, so it will not be known whether the fine-tune does harm; "
        "`data='DIR'` tells"
    )
    seen.notes.clear()
    run(model(), few, HARMLESS, observer=seen, judge=lambda judged: 42.0)  # who judges will see it
    assert not any("hold" in note for note in seen.notes)
    report = run(model(), some, HARMLESS, setup=setup(guard=False), observer=seen)
    assert (report.held_out, report.history[0]["updates"]) == (None, 25)
    assert not any("hold" in note for note in seen.notes)


def test_predictors_that_are_new_are_no_new_head(some: Source) -> None:
    assert methods()["dyvit"].needs_training
    report = run(model("dyvit"), some, HARMLESS, setup=setup(batch_size=20))
    assert report.held_out is not None
    assert report.held_out.images == 40


@pytest.mark.slow
def test_training_is_as_random_as_without_the_judging(some: Source) -> None:
    # The images that are left, given as such, are trained on alike.
    left = hold_out(some, 0.2, 0)[0]
    guarded, plain = trained_digits(), trained_digits()
    run(guarded, some, HARMLESS, setup=setup(batch_size=20))
    run(plain, left, HARMLESS, setup=setup(batch_size=20, guard=False))
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(guarded).items())
