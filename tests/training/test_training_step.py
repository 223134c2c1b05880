"""One step: its images in one pass or several, the keep rate it runs at, and a batch too large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import model, run, setup, weights

from tokencut.data.sources import Source
from tokencut.errors import TokencutError
from tokencut.model import CompressedModel
from tokencut.training.recipe import SHORT
from tokencut.training.step import Trainer, warmed


def test_a_batch_that_does_not_fit_says_which_would(few: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trainer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "_backward", full)
    with pytest.raises(TokencutError) as caught:
        run(model(), few)
    assert str(caught.value) == (
        "a batch of 8 images does not fit into the memory of cpu; type --batch-size 4 --accumulate 2, which "
        "trains alike"
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
