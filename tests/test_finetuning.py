"""Fine-tuning: it learns, each part of a recipe takes effect, and a run that was cut goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_files import write_folder
from torch import Tensor, nn

from tokencut import digits, evaluation, finetuning
from tokencut.compression import CompressedModel, compress
from tokencut.distributed import Group, alone, process_group
from tokencut.errors import ArtifactError, DataError, TokencutError, UsageError
from tokencut.finetuning import finetune
from tokencut.sources import Source, open_source
from tokencut.spread_evaluation import _merged, evaluate_spread
from tokencut.training_data import Augmented, Order, Part, hold_out, seed_all
from tokencut.training_recipe import (
    NEW_WEIGHTS_LR,
    PAPER,
    RECIPES,
    SHORT,
    TrainingRecipe,
    make_optimizer,
    make_scheduler,
    recipe_named,
)
from tokencut.training_setup import FinetuneReport, TrainingProgress, TrainingSetup, Watcher
from tokencut.training_state import load_state
from tokencut.training_step import Trainer, TrainingDivergedError, warmed

CPU = alone(torch.device("cpu"))
# Everything random that there is.
WILD = TrainingRecipe(
    epochs=2, lr=1e-2, hflip=0.5, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, mixup=0.8,
    cutmix=1.0, label_smoothing=0.1, ema_decay=0.9, warmup_epochs=0.5, layer_decay=0.8, keep_warmup=1.0, alpha=0.1,
    beta=0.1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def few() -> Source:
    """Forty training digits."""
    return Part(open_source("digits", split="train"), range(40))


def model(method: str = "evit", **args: Any) -> CompressedModel:
    """A tiny model for digits, random but always the same: 16 image tokens, then 8, then 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=10, depth=3, **args)
        return compress(dense, keep=0.5, layers=[1, 2], method=method).eval()


def setup(**changes: Any) -> TrainingSetup:
    return TrainingSetup(**{"batch_size": 8, "workers": 0, **changes})


def weights(trained: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trained.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def stop_after(steps: int) -> Watcher:
    """Asks to stop once so many steps are done."""
    done: list[TrainingProgress] = []
    return Watcher(on_step=done.append, should_stop=lambda: len(done) >= steps)


def run(trained: CompressedModel, data: Any, recipe: TrainingRecipe = WILD, **options: Any) -> FinetuneReport:
    return finetune(trained, data, **{"recipe": recipe, "setup": setup(), "group": CPU, **options})


def test_it_wins_back_what_was_lost_on_digits() -> None:
    # Half of the bundled training images, so that it takes seconds.
    source = Part(open_source("digits", split="train"), range(0, 1197, 2))
    cut = compress(digits.create(), keep=0.1, layers=[1], method="random")
    before = evaluation.evaluate(cut, "digits", workers=0, device="cpu", limit=300)
    report = run(cut, source, SHORT.changed(epochs=2, lr=1e-3), setup=setup(batch_size=32))
    after = evaluation.evaluate(cut, "digits", workers=0, device="cpu", limit=300)
    assert after.top1 > before.top1 + 5
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert (report.finished, report.epochs, report.chosen) == (True, 2, 2)
    assert not cut.training


def test_the_history_tells_terms_apart(few: Source) -> None:
    rows: list[Any] = []
    report = run(model(), few, WILD, judge=lambda judged: 42.0, watcher=Watcher(on_epoch=lambda h: rows.append(len(h))))
    first, last = report.history
    assert {"loss", "task", "distillation", "importance", "diversity", "top1", "lr", "seconds"} <= set(first)
    halves, tenths = first["task"] + first["distillation"], first["importance"] + first["diversity"]
    assert first["loss"] == pytest.approx(0.5 * halves + 0.1 * tenths, rel=1e-5)
    assert (last["epoch"], last["updates"], last["top1"], rows) == (2, 10, 42.0, [1, 2])


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


@pytest.mark.parametrize(("steps", "method"), [(1, "evit"), (5, "bat"), (7, "evit"), (8, "dyvit")])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(few: Source, tmp_path: Path, steps: int, method: str) -> None:
    recipe = WILD if method != "dyvit" else dataclasses.replace(WILD, alpha=0.0, beta=0.0, keep_warmup=0.0)
    whole, cut, resumed = model(method), model(method), model(method)
    assert run(whole, few, recipe).finished
    assert not run(cut, few, recipe, state=tmp_path, watcher=stop_after(steps)).finished
    # Twice: at another step once more.
    run(cut := model(method), few, recipe, state=tmp_path, resume=True, watcher=stop_after(1))
    random.seed(99)
    torch.manual_seed(99)
    report = run(resumed, few, recipe, state=tmp_path, resume=True)
    assert same(weights(whole), weights(resumed))
    assert [row["epoch"] for row in report.history] == [1, 2]


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(few: Source, tmp_path: Path) -> None:
    whole, resumed = model(), model()
    expected = run(whole, few)

    class KilledError(Exception):
        pass

    def kill(progress: TrainingProgress) -> None:
        if (progress.epoch, progress.step) == (2, 3):
            raise KilledError

    with pytest.raises(KilledError):
        run(model(), few, state=tmp_path, watcher=Watcher(on_step=kill))
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

    report = run(model(), few, setup=setup(workers=2), watcher=Watcher(on_step=signal_workers))
    assert report.finished
    assert len(signalled) == 4


def test_a_state_is_written_while_a_long_epoch_lasts(
    few: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "SAVE_EVERY", -1.0)
    seen: list[tuple[int, int]] = []

    def look(progress: TrainingProgress) -> None:
        if progress.step > 1:
            conditions = torch.load(tmp_path / "state.pt", weights_only=True)["conditions"]
            found = load_state(tmp_path, conditions)
            seen.append((found.epoch, found.step))

    run(model(), few, SHORT.changed(epochs=1), state=tmp_path, watcher=Watcher(on_step=look))
    assert seen == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_a_resume_with_other_images_is_refused(few: Source, tmp_path: Path) -> None:
    run(model(), few, state=tmp_path, watcher=stop_after(1))
    with pytest.raises(ArtifactError, match="holds a run with another --train-data: it has 40 images"):
        run(model(), Part(few, range(39)), state=tmp_path, resume=True)


def test_select_best_takes_the_best_epoch_of_held_out_images(few: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, kept = iter((10.0, 30.0, 20.0)), []

    def score(group: Group, judged: nn.Module, held: Source, **_: Any) -> Any:
        kept.append(weights(judged))
        assert len(held) == 4
        return type("Report", (), {"top1": next(scores)})

    monkeypatch.setattr(finetuning, "evaluate_spread", score)
    trained = model()
    report = run(trained, few, SHORT.changed(epochs=3), setup=setup(select="best"))
    assert report.chosen == 2
    assert same(kept[1], weights(trained))
    assert [row["top1"] for row in report.history] == [10.0, 30.0, 20.0]
    assert report.history[0]["updates"] == 4  # of 36 images


def test_held_out_images_are_a_seeded_share_of_every_class() -> None:
    source = open_source("digits", split="train")
    kept, held = hold_out(source, 0.1, seed=0)
    names = [[part.filename(i) for i in range(len(part))] for part in (kept, held)]
    assert len(names[0]) + len(names[1]) == 1197 == len({*names[0], *names[1]})
    counts = np.bincount(held.folders(), minlength=10)
    assert (len(held), counts.min(), counts.max()) == (120, 12, 12)
    assert hold_out(source, 0.1, seed=0)[1].indices == held.indices != hold_out(source, 0.1, seed=1)[1].indices
    with held[0][0] as first, source[held.indices[0]][0] as second:
        assert first.read() == second.read()
    with pytest.raises(DataError, match="are too few to hold some out for choosing an epoch; type --select last"):
        hold_out(Part(source, [0, 1]), 0.1, seed=0)


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


def test_a_batch_that_does_not_fit_says_which_would(few: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trainer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "_backward", full)
    with pytest.raises(TokencutError) as caught:
        run(model(), few)
    assert str(caught.value) == (
        "a batch of 8 images does not fit in the memory of cpu; type --batch-size 4 --accumulate 2, which trains alike"
    )

    def broken(self: Trainer, batch: Any) -> Any:
        raise RuntimeError("another matter")

    monkeypatch.setattr(Trainer, "_backward", broken)
    with pytest.raises(RuntimeError, match="another matter"):
        run(model(), few)


def test_two_passes_make_one_update_of_twice_the_images(few: Source) -> None:
    recipe = SHORT.changed(epochs=1, lr=1e-2)
    once, twice = model(), model()
    run(once, few, recipe, setup=setup(batch_size=8))
    run(twice, few, recipe, setup=setup(batch_size=4, accumulate=2))
    for name, tensor in weights(once).items():
        torch.testing.assert_close(tensor, weights(twice)[name], rtol=1e-3, atol=1e-4)


def test_an_order_gives_every_process_its_part_and_every_image_once() -> None:
    one = Order(images=23, batch=8, seed=5)
    two = [Order(images=23, batch=2, accumulate=2, seed=5, rank=rank, size=2) for rank in (0, 1)]
    assert (one.steps, two[0].steps) == (2, 2)
    whole = [{image for _, image in part} for part in one.passes(0)]
    parts = [list(order.passes(0)) for order in two]
    assert [len(part) for part in parts[0]] == [2, 2, 2, 2]
    for step in range(2):
        drawn = [key for part in parts for batch in part[2 * step : 2 * step + 2] for key in batch]
        assert {image for _, image in drawn} == whole[step]
        assert len(drawn) == 8
    assert list(one.passes(0, first=1)) == list(one.passes(0))[1:]
    assert list(one.passes(0)) != list(one.passes(1))


def test_fewer_images_than_a_step_takes_are_one_step() -> None:
    parts = [list(Order(5, 4, 2, rank=rank, size=2).passes(0)) for rank in (0, 1)]
    assert [[len(batch) for batch in part] for part in parts] == [[1, 1], [1, 2]]


def test_augmentation_follows_from_epoch_and_image(few: Source) -> None:
    class Numbers:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> float:
            return random.random() + torch.rand(1).item()

    images: Any = Augmented(Numbers(), seed=0)  # type: ignore[arg-type]
    first = images[0, 3]
    assert images[1, 3] != first != images[0, 4]
    assert images[0, 3] == first
    seed_all(0)


def test_weight_decay_spares_norms_biases_and_tokens() -> None:
    cut = model("dyvit", reg_tokens=1)
    optimizer = make_optimizer(cut, SHORT, 256, new_head=False)
    names = {id(weight): name for name, weight in cut.named_parameters()}
    decayed = {names[id(w)] for g in optimizer.param_groups if g["weight_decay"] for w in g["params"]}
    spared = {names[id(w)] for g in optimizer.param_groups if not g["weight_decay"] for w in g["params"]}
    assert decayed | spared == set(names.values())
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"model.cls_token", "model.reg_token", "model.pos_embed", "model.norm.weight", "model.head.bias"} <= spared
    fresh = [g for g in optimizer.param_groups if g["lr_scale"] == NEW_WEIGHTS_LR]
    assert all(names[id(weight)].startswith("stages.") for group in fresh for weight in group["params"])


def test_a_new_head_learns_faster_and_layer_decay_slows_the_first_blocks() -> None:
    cut = model()
    names = {id(weight): name for name, weight in cut.named_parameters()}
    recipe = dataclasses.replace(SHORT, layer_decay=0.5)
    optimizer = make_optimizer(cut, recipe, 1024, new_head=True)
    scheduler = make_scheduler(optimizer, recipe, batch=1024, epochs=1, updates=10)
    rates = {names[id(w)]: g["lr"] for g in optimizer.param_groups for w in g["params"]}
    assert rates["model.head.weight"] == pytest.approx(SHORT.lr * 2 * NEW_WEIGHTS_LR)  # sqrt(1024 / 256)
    assert rates["model.blocks.2.mlp.fc1.weight"] == pytest.approx(2 * rates["model.blocks.1.mlp.fc1.weight"])
    scheduler.step_update(10)
    rates = {names[id(w)]: g["lr"] for g in optimizer.param_groups for w in g["params"]}
    assert rates["model.head.weight"] == pytest.approx(SHORT.lr * 2 * NEW_WEIGHTS_LR * SHORT.min_lr)


def test_the_paper_s_recipe_is_the_published_one() -> None:
    assert (PAPER.epochs, PAPER.lr_for(1024), PAPER.lr_for(1024) * PAPER.min_lr) == (30, 4e-5, pytest.approx(2e-6))
    assert (PAPER.warmup_epochs, PAPER.alpha, PAPER.beta) == (0, 0, 0)
    assert {SHORT.alpha, SHORT.beta} == {0}


def test_a_small_set_gets_more_epochs_unless_their_number_was_typed() -> None:
    assert (SHORT.epochs_for(19), SHORT.epochs_for(1251), SHORT.changed(epochs=2).epochs_for(19)) == (16, 1, 2)


def test_keep_warms_up_from_all_tokens_to_the_recipe_s(few: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    target = model().recipe
    assert warmed(target, 0.0).stages == ()
    assert [stage.tokens_out for stage in warmed(target, 0.5).stages] == [12, 9]
    assert warmed(target, 1.0).stages == target.stages
    counts: list[int] = []
    forward = CompressedModel.forward

    def watch(self: CompressedModel, images: Tensor) -> Tensor:
        if self.training:
            counts.append(sum(stage.tokens_out for stage in self.recipe.stages_for(16)))
        return forward(self, images)

    monkeypatch.setattr(CompressedModel, "forward", watch)
    trained = model()
    run(trained, few, SHORT.changed(epochs=2, keep_warmup=1.0, distill="none"))
    assert counts[0] == 0
    assert counts[:5] != [12] * 5
    assert counts[5:] == [12] * 5
    assert trained.recipe == target


def test_drop_path_stays_as_the_model_has_it(few: Source) -> None:
    trained = model(drop_path_rate=0.3)
    rates = [module.drop_prob for module in trained.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)
    run(trained, few, SHORT.changed(epochs=1), watcher=stop_after(1))
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
    compiled: list[str] = []

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", record)
    first, second = model(), model()
    run(first, few, SHORT.changed(epochs=1))
    assert compiled == []
    run(second, few, SHORT.changed(epochs=1), setup=setup(compiled=True))
    assert compiled == ["_run_student", "_run_teacher"]
    assert same(weights(first), weights(second))


def test_a_new_head_trains_without_distillation_and_says_so(few: Source) -> None:
    notes: list[str] = []
    watcher = Watcher(on_start=notes.extend)
    report = run(model(), few, SHORT.changed(epochs=1), setup=setup(new_head=True), watcher=watcher)
    assert "distillation" not in report.history[0]
    assert notes[-1].startswith("the head is new, so there are no logits to distil from: distillation is off")
    features = SHORT.changed(epochs=1, distill="features")
    assert "distillation" in run(model(), few, features, setup=setup(new_head=True)).history[0]


def test_images_that_cannot_be_read_are_left_out_or_too_many(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", [str(number) for number in range(10)], images=11)
    (folder / "3" / "5.jpg").write_bytes(b"no image")
    report = run(model(), folder, SHORT.changed(epochs=2))
    assert report.notes == ("training images skipped, since they could not be decoded: 1",)
    (folder / "4" / "5.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="more than 1 % of the images in .* cannot be decoded, such as"):
        run(model(), folder, SHORT.changed(epochs=2))


def test_a_head_of_another_size_is_offered(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", ["a", "b", "c"], images=1)
    with pytest.raises(DataError) as caught:
        run(model(), folder)
    assert str(caught.value) == (
        f"{str(folder)!r} has 3 class folders ('a', 'b', 'c'), the model's head has 10 classes; type --num-classes 3 "
        "beside an architecture's name to train a new head"
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainingSetup(batch_size=0), "a batch size of 0 is too small, expected at least 1; type --batch-size "
         "64"),
        (lambda: TrainingSetup(accumulate=0), "--accumulate 0 is too small, expected at least 1; type --accumulate 1"),
        (lambda: TrainingSetup(workers=-1), "-1 workers are too few, expected at least 0; type --workers 0"),
        (lambda: TrainingSetup(precision="fp16"), "training in fp16 is not supported, since its gradients underflow; "
         "type --precision bf16"),
        (lambda: TrainingSetup(select="first"), "--select first is not last or best; type --select last"),
        (lambda: SHORT.changed(epochs=0), "--finetune-epochs 0 is not a number of at least 1; type --finetune-epochs "
         "1"),
        (lambda: SHORT.changed(lr=float("nan")), "--lr nan is not a number of at least 1e-12; type --lr 0.0002"),
        (lambda: SHORT.changed(hflip=1.5), "--hflip 1.5 is not a number from 0 to 1; type --hflip 0.0"),
        (lambda: SHORT.changed(distill="sof"), "--distill sof is not one of soft, hard, features, none; type --distill "
         "soft"),
        (lambda: recipe_named("long"), "unknown recipe 'long', expected short or paper; type --recipe short"),
        (lambda: Trainer(model("dyvit"), dataclasses.replace(SHORT, keep_warmup=1.0), SHORT.objective, Order(8, 8), 1,
                         CPU), "--keep-warmup lowers a keep rate, which method dyvit with --reduce-by or learned "
         "stages does not follow; leave it out"),
    ],
)  # fmt: skip
def test_wrong_arguments(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == words


def test_every_recipe_is_in_the_limits() -> None:
    assert all(recipe_named(name) == recipe for name, recipe in RECIPES.items())


def test_alone_there_is_nobody_to_tell() -> None:
    with process_group(torch.device("cpu")) as group:
        assert (group.rank, group.size, group.main) == (0, 1, True)
        assert (group.share("a"), group.collect("b"), group.any(True), group.any(False)) == ("a", ["b"], True, False)


class _Dealt(Group):
    """A process of several, whose others are run beside it."""


def test_a_spread_evaluation_counts_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged, source = digits.create(), Part(open_source("digits"), range(31))
    whole = evaluation.evaluate(judged, source, workers=0, device="cpu")
    monkeypatch.setattr(_Dealt, "collect", lambda self, value: [value])
    parts = []
    for rank in range(3):
        group = _Dealt(rank, 3, torch.device("cpu"))
        parts.append(evaluate_spread(group, judged, source, workers=0))
    assert sorted(part.images for part in parts) == [10, 10, 11]
    merged = _merged(parts)
    assert (merged.images, merged.top1, merged.top5) == (31, whole.top1, whole.top5)
    assert merged.loss == pytest.approx(whole.loss, rel=1e-6)
    with pytest.raises(DataError, match="2 images in 'digits' are too few for 3 processes"):
        evaluate_spread(_Dealt(0, 3, torch.device("cpu")), judged, Part(source, [0, 1]), workers=0)
    monkeypatch.setattr(_Dealt, "collect", lambda self, value: [parts[0], value])
    with pytest.raises(DataError, match="a batch size of 0 is too small"):
        evaluate_spread(_Dealt(0, 3, torch.device("cpu")), judged, source, workers=0, batch_size=0)
