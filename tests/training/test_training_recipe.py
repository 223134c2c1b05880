"""Recipes: their limits, and the optimizer and the schedule made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from training_runs import CPU, model

from tokencut.errors import UsageError
from tokencut.training.order import Order
from tokencut.training.recipe import (
    NEW_WEIGHTS_LR,
    PAPER,
    RECIPES,
    SHORT,
    make_optimizer,
    make_scheduler,
    recipe_named,
)
from tokencut.training.setup import TrainingSetup
from tokencut.training.step import Trainer


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
