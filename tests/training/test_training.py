"""Fine-tuning: it learns, its result and its notes are as said, and each way to run it takes effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import write_folder
from observing import Seen
from torch import Tensor, nn
from training_runs import WILD, model, run, same, setup, stop_after, weights

from tokencut.data.sources import Source, Subset, open_source
from tokencut.errors import DataError, UsageError
from tokencut.evaluation import accuracy
from tokencut.model import compress
from tokencut.models import digits
from tokencut.runtime.distributed import Group, single_process
from tokencut.training import run as training
from tokencut.training.recipe import SHORT
from tokencut.training.state import load_state
from tokencut.training.step import Trainer, TrainingDivergedError


@pytest.mark.slow
def test_it_wins_back_what_was_lost_on_digits() -> None:
    # Half of the bundled training images, so that it takes seconds.
    source = Subset(open_source("digits", split="train"), range(0, 1197, 2))
    cut = compress(digits.create(), keep=0.1, layers=[1], method="random")
    before = accuracy.evaluate(cut, "digits", workers=0, device="cpu", limit=300)
    report = run(cut, source, SHORT.changed(epochs=2, lr=1e-3), setup=setup(batch_size=32))
    after = accuracy.evaluate(cut, "digits", workers=0, device="cpu", limit=300)
    assert after.top1 > before.top1 + 5
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert (report.finished, report.epochs, report.chosen) == (True, 2, 2)
    assert not cut.training


def test_the_history_tells_terms_apart(few: Source) -> None:
    seen = Seen()
    report = run(
        model(),
        few,
        WILD,
        judge=lambda judged: 42.0,
        observer=seen,
    )
    first, last = report.history
    assert {"loss", "task", "distillation", "importance", "diversity", "top1", "lr", "seconds"} <= set(first)
    halves, tenths = first["task"] + first["distillation"], first["importance"] + first["diversity"]
    assert first["loss"] == pytest.approx(0.5 * halves + 0.1 * tenths, rel=1e-5)
    assert (last["epoch"], last["updates"], last["top1"], seen.epochs) == (2, 10, 42.0, [(1, 5), (2, 10)])


def test_select_best_takes_the_best_epoch_of_held_out_images(few: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, kept = iter((0, 1, 3, 2)), []

    def score(group: Group, judged: nn.Module, held: Source, **_: Any) -> Any:
        kept.append(weights(judged))
        assert len(held) == 4
        hits = next(scores)
        return type("Report", (), {"numbers": range(4), "correct": [number < hits for number in range(4)]})

    monkeypatch.setattr(training, "evaluate_spread", score)
    trained = model()
    report = run(trained, few, SHORT.changed(epochs=3), setup=setup(select="best"))
    assert report.chosen == 2
    assert same(kept[2], weights(trained))
    assert [row["top1"] for row in report.history] == [25.0, 75.0, 50.0]
    assert report.held_out is not None
    assert (report.held_out.before, report.held_out.after, report.held_out.kept) == (0.0, 75.0, "after")
    assert report.history[0]["updates"] == 4  # of 36 images


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_with_the_last_good_weights(
    few: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    good, step = model(), Trainer.step
    seen: list[dict[str, Tensor]] = []

    def spoil(trainer: Trainer, epoch: int, number: int, batches: Any) -> dict[str, float]:
        seen.append(weights(trainer.model))
        if number == 2:
            weight = next(trainer.model.parameters())
            if what == "gradient":
                weight.register_hook(lambda gradient: gradient * float("nan"))
            else:
                forward = trainer.objective._student
                trainer.objective._student = lambda images: forward(images * float("nan"))
        return step(trainer, epoch, number, batches)

    monkeypatch.setattr(Trainer, "step", spoil)
    with pytest.raises(TrainingDivergedError) as caught:
        run(good, few, SHORT, state=tmp_path)
    assert str(caught.value).startswith(f"the {what} is not a finite number at epoch 1, step 3 of 5; type a smaller")
    assert same(weights(good), seen[-1])
    assert load_state(tmp_path, torch.load(tmp_path / "state.pt", weights_only=True)["conditions"]).step == 2


def test_a_new_head_trains_without_distillation_and_says_so(few: Source) -> None:
    seen = Seen()
    report = run(model(), few, SHORT.changed(epochs=1), setup=setup(new_head=True), observer=seen)
    assert "distillation" not in report.history[0]
    assert seen.notes[-1].startswith("the head is new, so there are no logits to distil from: distillation is off")
    features = SHORT.changed(epochs=1, distill="features")
    assert "distillation" in run(model(), few, features, setup=setup(new_head=True)).history[0]


def test_images_that_cannot_be_read_are_left_out_or_too_many(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", [str(number) for number in range(10)], images=11)
    (folder / "3" / "5.jpg").write_bytes(b"no image")
    report = run(model(), folder, SHORT.changed(epochs=2))
    assert report.notes == ("training images skipped, since they could not be decoded: 1",)
    (folder / "4" / "5.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="at least .* images in .* cannot be decoded, and at most 1 % may be: "):
        run(model(), folder, SHORT.changed(epochs=2))


def test_a_head_of_another_size_is_offered(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", ["a", "b", "c"], images=1)
    with pytest.raises(DataError) as caught:
        run(model(), folder)
    assert str(caught.value) == (
        f"{str(folder)!r} has 3 class folders ('a', 'b', 'c'), the model's head has 10 classes; type `num_classes=3` "
        "beside an architecture's name to train a new head"
    )


def test_drop_path_stays_as_the_model_has_it(few: Source) -> None:
    trained = model(drop_path_rate=0.3)
    rates = [module.drop_prob for module in trained.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)
    run(trained, few, SHORT.changed(epochs=1), observer=stop_after(1))
    assert [module.drop_prob for module in trained.modules() if hasattr(module, "drop_prob")] == rates


def test_the_running_average_is_the_result(few: Source) -> None:
    plain, averaged = model(), model()
    run(plain, few, SHORT.changed(epochs=1, lr=1e-2))
    run(averaged, few, SHORT.changed(epochs=1, lr=1e-2, ema_decay=0.99))
    assert not same(weights(plain), weights(averaged))


def test_bf16_trains_weights_that_stay_fp32(few: Source) -> None:
    trained = model()
    report = run(trained, few, SHORT.changed(epochs=1), setup=setup(precision="bf16"))
    assert report.history[0]["loss"] > 0
    assert {tensor.dtype for tensor in trained.state_dict().values()} == {torch.float32}


def test_compile_is_asked_for(few: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, str]] = []

    def record(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        compiled.append((function.__name__, mode))
        return function

    monkeypatch.setattr(torch, "compile", record)
    first, second = model(), model()
    run(first, few, SHORT.changed(epochs=1))
    assert compiled == []
    run(second, few, SHORT.changed(epochs=1), setup=setup(compiled=True))
    assert compiled == [("_run_student", "default"), ("_run_teacher", "default")]
    assert same(weights(first), weights(second))
    run(model(), few, SHORT.changed(epochs=1), setup=setup(compiled=True, compile_mode="reduce-overhead"))
    assert compiled[2:] == [("_run_student", "reduce-overhead"), ("_run_teacher", "reduce-overhead")]


def test_graphs_of_a_step_do_not_add_up_gradients() -> None:
    with pytest.raises(UsageError, match="`compile_mode='reduce-overhead'` records CUDA graphs, .*`accumulate=2`"):
        setup(accumulate=2, compiled=True, compile_mode="reduce-overhead")
    with pytest.raises(UsageError, match="unknown compile mode 'fast', expected one of default"):
        setup(compiled=True, compile_mode="fast")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler, about itself
def test_a_step_from_graphs_is_that_of_the_compiled_model(few: Source) -> None:
    recipe = SHORT.changed(epochs=2, lr=1e-3)
    plain, recorded = model(), model()
    run(plain, few, recipe, setup=setup(compiled=True, precision="bf16"), group=single_process(torch.device("cuda")))
    graphs = setup(compiled=True, compile_mode="reduce-overhead", precision="bf16")
    run(recorded, few, recipe, setup=graphs, group=single_process(torch.device("cuda")))
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(recorded)[name], weight, rtol=1e-3, atol=1e-4)
