"""One step: its images in one pass or several, the keep rate it runs at, and a batch too large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import CPU, model, run, setup, weights

from tokencut.data.loading import Batch, Unreadable
from tokencut.data.sources import Source
from tokencut.errors import TokencutError, UsageError
from tokencut.model import CompressedModel
from tokencut.training.order import Order
from tokencut.training.recipe import SHORT
from tokencut.training.step import Trainer, warmed


def test_a_batch_that_does_not_fit_says_which_would(few: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trainer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "_backward", full)
    with pytest.raises(TokencutError) as caught:
        run(model(), few)
    assert str(caught.value) == (
        "a batch of 8 images does not fit into the memory of cpu; type `batch_size=4, accumulate=2`, which trains alike"
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_the_mean_over_the_images_that_were_decoded(accumulate: int) -> None:
    # A step of eight images of which three cannot be read, all of those of a second pass but one.
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
    targets = torch.tensor([0, 1, 2, 3, 4])
    missing = tuple(Unreadable(index, "no image") for index in (5, 6, 7))
    bounds = [(0, 5)] if accumulate == 1 else [(0, 4), (4, 5)]
    batches = [Batch(images[first:last], targets[first:last], torch.arange(first, last), missing)
               for first, last in bounds]  # fmt: skip
    order = Order(8, 8 // accumulate, accumulate)
    trained = model().train()
    recipe = SHORT.changed(clip_grad=0.0, random_erasing=0.0, distill="none")
    trainer = Trainer(trained, recipe, recipe.objective, order, 1, CPU)
    losses = [trainer.objective(trainer.preprocessing.normalise(image[None], CPU.device), target[None]).total
              for image, target in zip(images, targets, strict=True)]  # fmt: skip
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(trained.parameters()), allow_unused=True)
    told = trainer.step(0, 0, iter(batches))
    assert told["images"] == 5
    for weight, gradient in zip(trained.parameters(), expected, strict=True):
        assert (weight.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 5.0])
@pytest.mark.parametrize("name", ["keep_warmup", "warmup_epochs"])
def test_a_warm_up_that_the_run_would_not_outlast_is_refused(few: Source, name: str, value: float) -> None:
    with pytest.raises(UsageError) as caught:
        run(model(), few, SHORT.changed(epochs=1, **{name: value}))
    assert str(caught.value) == (
        f"`{name}` {value:g} is no part of 1 epoch, so that the run would end before it is warm; give less, such as 0.2"
    )


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
