"""Recipes: their limits, and the optimizer and the schedule made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from training_runs import CPU, model

from tokencut.errors import UsageError
from tokencut.model import CompressedModel
from tokencut.training.order import Order
from tokencut.training.recipe import (
    NEW_WEIGHTS_LR,
    PAPER,
    RECIPES,
    SHORT,
    STEPS_AN_OCTAVE,
    TrainingRecipe,
    make_optimizer,
    make_scheduler,
    recipe_named,
)
from tokencut.training.setup import TrainingSetup
from tokencut.training.step import Trainer

UNSCALED = SHORT.changed(lr_scaling="none")


def scales(cut: CompressedModel, recipe: TrainingRecipe = SHORT, *, new_head: bool = False) -> dict[str, float]:
    """The factor of each weight's learning rate, by its name."""
    names = {id(weight): name for name, weight in cut.named_parameters()}
    groups = make_optimizer(cut, recipe, 256, new_head=new_head).param_groups
    return {names[id(weight)]: group["lr_scale"] for group in groups for weight in group["params"]}


def test_weight_decay_spares_norms_biases_and_tokens() -> None:
    cut = model("dyvit", reg_tokens=1)
    optimizer = make_optimizer(cut, UNSCALED, 256, new_head=False)
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
    recipe = dataclasses.replace(UNSCALED, layer_decay=0.5)
    optimizer = make_optimizer(cut, recipe, 1024, new_head=True)
    scheduler = make_scheduler(optimizer, recipe, batch=1024, epochs=1, updates=10)
    rates = {names[id(w)]: g["lr"] for g in optimizer.param_groups for w in g["params"]}
    assert rates["model.head.weight"] == pytest.approx(SHORT.lr * 2 * NEW_WEIGHTS_LR)  # sqrt(1024 / 256)
    assert rates["model.blocks.2.mlp.fc1.weight"] == pytest.approx(2 * rates["model.blocks.1.mlp.fc1.weight"])
    scheduler.step_update(10)
    rates = {names[id(w)]: g["lr"] for g in optimizer.param_groups for w in g["params"]}
    assert rates["model.head.weight"] == pytest.approx(SHORT.lr * 2 * NEW_WEIGHTS_LR * SHORT.min_lr)


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_each_matrix_moves_by_the_size_of_its_weights(weight_decay: float) -> None:
    cut = model("dyvit")
    matrices = [
        (name, weight) for name, weight in cut.named_parameters()
        if weight.ndim > 1 and not name.startswith("stages.") and "token" not in name and "pos_embed" not in name
    ]  # fmt: skip
    assert len(matrices) == 3 * 4 + 2  # four a block, patch embedding and head
    with torch.no_grad():
        for name, weight in matrices:
            signs = 1.0 - 2.0 * (torch.arange(weight.numel()) % 2).view_as(weight)
            weight.copy_(signs * {"model.head.weight": 0.4, "model.blocks.0.mlp.fc1.weight": 0.0}.get(name, 0.0125))
    found = scales(cut, SHORT.changed(weight_decay=weight_decay))
    # Root mean squares over 0.05: a quarter, and 8; the mean of their logarithms, (12 * -2 + 3) / 13 = -1.615 octaves,
    # is -6.46 quarters of one.
    average = 2**-1.5
    assert found["model.head.weight"] == 8
    assert found["model.blocks.1.attn.qkv.weight"] == found["model.patch_embed.proj.weight"] == 0.25
    assert found["model.blocks.0.mlp.fc1.weight"] == average  # zeros have no size
    assert found["model.cls_token"] == found["model.norm.weight"] == found["model.blocks.1.attn.qkv.bias"] == average
    assert {scale for name, scale in found.items() if name.startswith("stages.")} == {NEW_WEIGHTS_LR}


@pytest.mark.parametrize("factor", [10.0, 16.0])
def test_a_model_written_with_smaller_weights_moves_less(factor: float) -> None:
    plain, written = model(), model()
    with torch.no_grad():
        for block in written.model.blocks:
            block.norm2.weight *= factor
            block.norm2.bias *= factor
            block.mlp.fc1.weight /= factor
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(written(images), plain(images))
    before, after = scales(plain), scales(written)
    for name, scale in after.items():
        expected = before[name] / factor if "fc1.weight" in name else before[name]
        if name.endswith(("qkv.weight", "proj.weight", "fc2.weight", "fc1.weight")):
            assert scale == pytest.approx(expected, rel=2 ** (1 / STEPS_AN_OCTAVE) - 1 if factor == 10 else 1e-12)


def test_scaling_goes_with_layer_decay_and_leaves_a_new_head_alone() -> None:
    cut = model()
    with torch.no_grad():
        cut.model.head.weight *= 1000  # would move all norms, were it counted
    plain, decayed = scales(cut, new_head=True), scales(cut, SHORT.changed(layer_decay=0.5), new_head=True)
    assert plain["model.head.weight"] == plain["model.head.bias"] == NEW_WEIGHTS_LR
    assert decayed["model.head.weight"] == NEW_WEIGHTS_LR
    first, last = "model.blocks.0.attn.qkv.weight", "model.blocks.2.attn.qkv.weight"
    assert decayed[first] / plain[first] == pytest.approx(0.25 * decayed[last] / plain[last])
    assert plain["model.norm.weight"] < 4
    every = [name for name, _ in cut.named_parameters()]
    assert sorted(plain) == sorted(decayed) == sorted(every)


def test_the_learning_rate_told_is_the_one_typed() -> None:
    trainer = Trainer(model(), SHORT, SHORT.objective, Order(256, 256), 1, CPU)
    assert trainer.lr == pytest.approx(SHORT.lr)


def test_the_paper_s_recipe_is_the_published_one() -> None:
    assert (PAPER.epochs, PAPER.lr_for(1024), PAPER.lr_for(1024) * PAPER.min_lr) == (30, 4e-5, pytest.approx(2e-6))
    assert (PAPER.warmup_epochs, PAPER.alpha, PAPER.beta) == (0, 0, 0)
    assert set(scales(model(), PAPER).values()) == {1.0}
    assert {SHORT.alpha, SHORT.beta} == {0}


def test_a_small_set_gets_more_epochs_unless_their_number_was_typed() -> None:
    assert (SHORT.epochs_for(19), SHORT.epochs_for(1251), SHORT.changed(epochs=2).epochs_for(19)) == (16, 1, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainingSetup(batch_size=0), "`batch_size=0` is not a whole number from 1 to 65536; "
        "type `batch_size=64`"),
        (lambda: TrainingSetup(accumulate=0), "`accumulate=0` is not a whole number from 1 to 65536; "
        "type `accumulate=1`"),
        (lambda: TrainingSetup(workers=-1), "`workers=-1` is not a whole number from 0 to 1024; type `workers=0`"),
        (lambda: TrainingSetup(precision="fp16"), "training in fp16 is not supported, since its gradients underflow; "
         "type `precision='bf16'`"),
        (lambda: TrainingSetup(select="first"), "`select='first'` is not last or best; type `select='last'`"),
        (lambda: SHORT.changed(epochs=0), "`epochs=0` is not a whole number from 1 to 100000; type `epochs=5`"),
        (lambda: SHORT.changed(lr=float("nan")), "`lr=nan` is not a number from 1e-12 to 10; type `lr=5e-05`"),
        (lambda: SHORT.changed(hflip=1.5), "`hflip=1.5` is not a number from 0 to 1; type `hflip=0.5`"),
        (lambda: SHORT.changed(distill="sof"), "`distill='sof'` is not one of soft, hard, features, none; type "
         "`distill='soft'`"),
        (lambda: SHORT.changed(lr_scaling="size"), "`lr_scaling='size'` is not one of rms, none; type "
         "`lr_scaling='rms'`"),
        (lambda: recipe_named("long"), "unknown recipe 'long', expected short or paper; type `recipe='short'`"),
        (lambda: Trainer(model("dyvit"), dataclasses.replace(SHORT, keep_warmup=1.0), SHORT.objective, Order(8, 8), 1,
                         CPU), "`keep_warmup` lowers a keep rate, which method dyvit with `reduce_by` or learned "
         "stages does not follow; leave it out"),
    ],
)  # fmt: skip
def test_wrong_arguments(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == words


def test_every_recipe_is_in_the_limits() -> None:
    assert all(recipe_named(name) == recipe for name, recipe in RECIPES.items())
