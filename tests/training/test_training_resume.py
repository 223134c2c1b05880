"""A fine-tune is a function of its seed, and a run that was cut goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from observing import Seen
from training_runs import WILD, model, run, same, setup, stop_after, weights

from tokencut.data.sources import Source, Subset
from tokencut.errors import ArtifactError
from tokencut.observers import TrainingProgress
from tokencut.training import run as training
from tokencut.training.recipe import SHORT
from tokencut.training.state import load_state


def test_the_same_seed_gives_the_same_weights_and_the_workers_change_nothing(few: Source) -> None:
    trained = [model() for _ in range(3)]
    states = torch.get_rng_state(), random.getstate()
    run(trained[0], few)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    run(trained[1], few, setup=setup(workers=2))
    run(trained[2], few, setup=setup(seed=1))
    first, second, other = map(weights, trained)
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "method"), [(1, "evit"), (5, "bat"), (7, "evit"), (8, "dyvit")])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(few: Source, tmp_path: Path, steps: int, method: str) -> None:
    recipe = WILD if method != "dyvit" else dataclasses.replace(WILD, alpha=0.0, beta=0.0, keep_warmup=0.0)
    whole, cut, resumed = model(method), model(method), model(method)
    assert run(whole, few, recipe).finished
    assert not run(cut, few, recipe, state=tmp_path, observer=stop_after(steps)).finished
    # Twice: at another step once more.
    run(cut := model(method), few, recipe, state=tmp_path, resume=True, observer=stop_after(1))
    random.seed(99)
    torch.manual_seed(99)
    report = run(resumed, few, recipe, state=tmp_path, resume=True)
    assert same(weights(whole), weights(resumed))
    assert [row["epoch"] for row in report.history] == [1, 2]


def test_a_run_that_ended_while_it_was_judged_goes_on_from_there(few: Source, tmp_path: Path) -> None:
    whole, cut, resumed = model(), model(), model()
    assert run(whole, few, judge=lambda judged: 42.0).finished

    def interrupted(judged: object) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cut, few, state=tmp_path, judge=interrupted)
    seen = Seen()
    report = run(resumed, few, state=tmp_path, resume=True, judge=lambda judged: 42.0, observer=seen)
    assert same(weights(whole), weights(resumed))
    assert (seen.steps[0].epoch, seen.steps[0].step) == (2, 1)  # none of the first epoch is done again
    assert [row["top1"] for row in report.history] == [42.0, 42.0]


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(few: Source, tmp_path: Path) -> None:
    whole, resumed = model(), model()
    expected = run(whole, few)

    class KilledError(Exception):
        pass

    def kill(progress: TrainingProgress) -> None:
        if (progress.epoch, progress.step) == (2, 3):
            raise KilledError

    with pytest.raises(KilledError):
        run(model(), few, state=tmp_path, observer=Seen(on_step=kill))
    report = run(resumed, few, state=tmp_path, resume=True)
    assert same(weights(whole), weights(resumed))
    timeless = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in report.history]
    assert timeless == [{k: row[k] for k in timeless[0]} for row in expected.history]


def test_processes_that_load_images_outlive_a_signal_to_the_whole_group(few: Source) -> None:
    signalled: list[int] = []

    def signal_workers(progress: TrainingProgress) -> None:
        if progress.step == 3:  # each of the two has given a batch
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGTERM)
                signalled.append(child.pid or 0)

    report = run(model(), few, setup=setup(workers=2), observer=Seen(on_step=signal_workers))
    assert report.finished
    assert len(signalled) == 4


def test_a_state_is_written_while_a_long_epoch_lasts(
    few: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)
    seen: list[tuple[int, int]] = []

    def look(progress: TrainingProgress) -> None:
        if progress.step > 1:
            conditions = torch.load(tmp_path / "state.pt", weights_only=True)["conditions"]
            found = load_state(tmp_path, conditions)
            seen.append((found.epoch, found.step))

    run(model(), few, SHORT.changed(epochs=1), state=tmp_path, observer=Seen(on_step=look))
    assert seen == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_a_resume_with_other_images_is_refused(few: Source, tmp_path: Path) -> None:
    run(model(), few, state=tmp_path, observer=stop_after(1))
    with pytest.raises(ArtifactError, match="holds a run made with other training images .40 images"):
        run(model(), Subset(few, range(39)), state=tmp_path, resume=True)


def test_a_run_may_go_on_with_more_epochs_by_the_schedule_of_all(few: Source, tmp_path: Path) -> None:
    three = WILD.changed(epochs=3)
    whole, longer = model(), model()
    rates = [row["lr"] for row in run(whole, few, three).history]
    run(model(), few, state=tmp_path, observer=stop_after(7))
    seen = Seen()
    report = run(longer, few, three, state=tmp_path, resume=True, observer=seen)
    assert report.finished
    assert [row["epoch"] for row in report.history] == [1, 2, 3]
    told = "the run was started with 2 epochs and has 3 now: from here on the learning rate follows the schedule of 3"
    assert told in seen.notes
    # The second and third epoch end at the rate that they have in a run of three; what is done stays done.
    assert [row["lr"] for row in report.history][1:] == rates[1:]
    assert report.history[0]["lr"] < rates[0]
    assert not same(weights(whole), weights(longer))


def test_what_goes_on_with_more_epochs_comes_to_the_same_each_time(few: Source, tmp_path: Path) -> None:
    three, made = WILD.changed(epochs=3), []
    for cut in (None, 12):  # once more stopped, in the third epoch
        folder = tmp_path / str(cut)
        folder.mkdir()
        run(model(), few, state=folder, observer=stop_after(7))
        if cut:
            assert not run(model(), few, three, state=folder, resume=True, observer=stop_after(6)).finished
        run(longer := model(), few, three, state=folder, resume=True)
        made.append(weights(longer))
    assert same(*made)


def test_fewer_epochs_than_are_done_are_refused(few: Source, tmp_path: Path) -> None:
    plain = dataclasses.replace(WILD, keep_warmup=0.0)
    run(model(), few, plain, state=tmp_path, observer=stop_after(7))
    with pytest.raises(ArtifactError) as caught:
        run(model(), few, plain.changed(epochs=1), state=tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path} holds a run that is at epoch 2, step 3, and this one has 1 epochs; type `epochs=2` or more, or "
        "`force=True` to start again"
    )


def test_a_changed_setting_is_told_by_itself(few: Source, tmp_path: Path) -> None:
    run(model(), few, state=tmp_path, observer=stop_after(1))
    with pytest.raises(ArtifactError) as caught:
        run(model(), few, dataclasses.replace(WILD, lr=2e-2, mixup=0.0), state=tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path} holds a run made with other `lr` (0.01, not 0.02) and other `mixup` (0.8, not 0.0); type the "
        "options it was started with, or `force=True` to start again"
    )


def test_with_force_what_cannot_go_on_starts_again(few: Source, tmp_path: Path) -> None:
    other = dataclasses.replace(WILD, lr=2e-2)
    run(whole := model(), few, other)
    for damaged in (False, True):
        run(model(), few, state=tmp_path, observer=stop_after(7))
        if damaged:
            (tmp_path / "state.pt").write_bytes(b"damaged")
        seen = Seen()
        run(again := model(), few, other, state=tmp_path, resume=True, force=True, observer=seen)
        assert any(note.endswith(": starting again, as `force=True` says") for note in seen.notes)
        assert same(weights(whole), weights(again))


def test_tensors_of_another_model_are_damage(few: Source, tmp_path: Path) -> None:
    run(model(), few, state=tmp_path, observer=stop_after(1))
    held = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in (("model", {}), ("optimizer", {}), ("optimizer", {"state": {}, "param_groups": [{}]})):
        torch.save({**held, name: value}, tmp_path / "state.pt")
        with pytest.raises(ArtifactError, match=r"is damaged \(its tensors are not those of this model\); type `force"):
            run(model(), few, state=tmp_path, resume=True)
