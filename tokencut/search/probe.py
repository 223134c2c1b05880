"""What a schedule does to a model on calibration images: its output against the dense model's own.

All schedules see the same images in the same order. The tokens of a reference schedule are kept block by block, so that
one which differs from it at a late block runs only from there; and one that falls behind a rival is given up early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut import cost
from tokencut.blocks import BlockLoop, Stage
from tokencut.calling import has_own_hooks
from tokencut.errors import ModelError
from tokencut.evaluation.statistics import mean_and_error
from tokencut.model import CompressedModel, stage_cost
from tokencut.search.space import Counts
from tokencut.tokens import Tokens

# What the kept tokens may take, in bytes: those of 512 images in all blocks of a DeiT-S are 1.9 GB.
KEPT_BYTES = 2 * 2**30
# A schedule that is behind its rival by so many standard errors, over the images seen so far, is given up.
BEHIND = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a schedule did, image by image; each `(images,)`, on the CPU.

    Attributes:
        divergence: KL divergence from the dense model's probabilities, in nats; for a model without a head, 1 less the
            cosine similarity of the pooled features.
        right: Whether top-1 is the label; None where there are no labels.
        agrees: Whether top-1 is the dense model's; None without a head.
        margin: By how much the dense model holds its own top-1 for likelier than this one: what the decision loses on
            average; 0 where they agree. Its probabilities are sharpened to fit the labels; None where there are none.
    """

    divergence: Tensor
    right: Tensor | None
    agrees: Tensor | None
    margin: Tensor | None = None

    @property
    def mean(self) -> float:
        """The mean damage."""
        return float(self.divergence.mean())


class Costs:
    """The closed form of one model and method, for any schedule."""

    def __init__(self, model: CompressedModel) -> None:
        self.shape = model.adapter.cost(model.model)
        self._stage = cache(partial(stage_cost, model.method))

    def rows(self, counts: Counts) -> tuple[cost.BlockRow, ...]:
        """Multiply-adds of an image: the embedding, each block, the head."""
        entering = (self.shape.patches, *counts)
        stages = {
            number: self._stage(block, before, after)
            for number, (block, before, after) in enumerate(zip(self.shape.blocks, entering, counts, strict=False), 1)
            if after < before
        }
        return cost.predict(self.shape, stages)

    def gmacs(self, counts: Counts) -> float:
        """Multiply-adds of an image, in units of 1e9."""
        return cost.total(self.rows(counts)) / 1e9


def any_block_reduces(model: CompressedModel) -> BlockLoop:
    """The loop of a model whose schedule does not count: any of its blocks may have a stage."""
    loop = model.loop
    return replace(loop, stages=dict.fromkeys(range(1, loop.depth + 1), Stage(model.method).eval()))


class Probe:
    """Runs a model under any schedule; call it in the model's `inference_state`.

    Attributes:
        dense: The dense model's own outcome.
        costs: The closed form.
        spent: Multiply-adds done so far, in units of 1e9.
        passes: What a dense forward of all images takes of that.
    """

    def __init__(
        self, model: CompressedModel, batches: Sequence[Tensor], targets: Tensor | None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Runs the dense model.

        Args:
            model: The model, whose method and settings count and whose schedule does not.
            batches: Images as the model takes them, `(B, C, H, W)` each, on its device.
            targets: The class of each image, `(images,)`; None where labels do not map to the head.
            on_batch: Called before each batch; may raise to end a measurement.

        Raises:
            ModelError: The model's output is not one vector an image, or not finite.
        """
        self.loop = any_block_reduces(model)
        around = (self.loop.model, self.loop.adapter.called_as_one(self.loop.model))
        if any(part is not None and has_own_hooks(part) for part in around):
            raise ModelError("the model has hooks on itself or on its blocks as a whole, and a search runs them one by "
                             "one; take them off for it (handle.remove()), or put them on the parts")  # fmt: skip
        self.costs = Costs(model)
        self.targets = None if targets is None else targets.cpu()
        self.on_batch = on_batch
        self._device = batches[0].device
        with torch.no_grad():
            self._embedded = [self.loop.embed(batch) for batch in batches]
            outputs = [self._checked(self.loop.model(batch)) for batch in batches]
        self._outputs = outputs
        self._inverse_temperature = (
            1.0 if targets is None else inverse_temperature(torch.cat(outputs), targets.to(self._device))
        )
        self.images = sum(len(batch) for batch in batches)
        features = self._embedded[0].features
        block_bytes = self.images * features[0].numel() * features.element_size()
        # Twice: the reference's tokens, and those of the schedule that may become it.
        self._every = max(1, math.ceil(2 * block_bytes * self.loop.depth / KEPT_BYTES))
        self._reference: Counts = ()
        self._kept: dict[int, list[Tokens]] = {}
        self._fresh: tuple[Counts, dict[int, list[Tokens]]] = ((), {})
        self.dense = self._outcome(outputs)
        self.passes = self.images * self.costs.gmacs((self.costs.shape.patches,) * self.loop.depth)
        self.spent = self.passes

    def _checked(self, output: Tensor) -> Tensor:
        if output.dim() != 2:
            raise ModelError(f"the model gives outputs of shape {tuple(output.shape)}, expected one vector an image: a "
                             "search compares those; build it with `global_pool='avg'`")  # fmt: skip
        if not output.isfinite().all():
            raise ModelError("the model gives outputs that are not finite numbers; check its weights, "
                             "or type `precision='fp32'`")  # fmt: skip
        return output.float()

    def measure(self, counts: Counts, rival: Outcome | None = None, share: float = 1.0) -> Outcome | None:
        """Runs a schedule over the images.

        Args:
            counts: Image tokens leaving each block.
            rival: The outcome that it has to beat; it is given up when clearly behind.
            share: Of the images, the first so many.

        Returns:
            What it did, or None where it was given up.
        """
        first = self._first(counts)
        rows = [row.macs / 1e9 for row in self.costs.rows(counts)]
        each = sum(rows[first + 1 :])
        fresh: dict[int, list[Tokens]] = {}
        outputs, seen = [], 0
        for number in range(max(1, round(share * len(self._embedded)))):
            self.on_batch()
            outputs.append(self._run(number, counts, first, fresh))
            self.spent += each * len(outputs[-1])
            seen += len(outputs[-1])
            if rival is not None and seen < self.images and self._is_behind(outputs, rival):
                return None
        if seen == self.images:
            self._fresh = (counts, fresh)
        return self._outcome(outputs)

    def set_reference(self, counts: Counts) -> None:
        """Makes the schedule that was measured last the reference, whose tokens are kept."""
        if self._fresh[0] != counts:
            return
        first = self._first(counts)
        kept = {block: tokens for block, tokens in self._kept.items() if block <= first}
        self._reference, self._kept = counts, {**kept, **self._fresh[1]}
        self._fresh = ((), {})

    def _first(self, counts: Counts) -> int:
        """How many blocks need not be run again."""
        return max((block for block in self._kept if self._reference[:block] == counts[:block]), default=0)

    @torch.no_grad()
    def _run(self, number: int, counts: Counts, first: int, fresh: dict[int, list[Tokens]]) -> Tensor:
        tokens = self._kept[first][number] if first else self._embedded[number]
        for block in range(first + 1, self.loop.depth + 1):
            tokens = self.loop.step(block, tokens, min(counts[block - 1], tokens.count))
            if block % self._every == 0:
                fresh.setdefault(block, []).append(tokens)
        return self.loop.head(tokens).float()

    def _is_behind(self, outputs: list[Tensor], rival: Outcome) -> bool:
        divergence = self._divergence(outputs)
        mean, error = mean_and_error(divergence - rival.divergence[: len(divergence)])
        return mean > BEHIND * error

    def _divergence(self, outputs: list[Tensor]) -> Tensor:
        parts = []
        for dense, output in zip(self._outputs, outputs, strict=False):
            if self.has_head:
                log_dense = dense.log_softmax(1)
                parts.append((log_dense.exp() * (log_dense - output.log_softmax(1))).sum(1))
            else:
                parts.append(1 - F.cosine_similarity(dense, output, dim=1))
        return torch.cat(parts).double().cpu()

    @property
    def has_head(self) -> bool:
        """Whether the outputs are logits."""
        return self.loop.adapter.num_classes(self.loop.model) > 0

    def _outcome(self, outputs: list[Tensor]) -> Outcome:
        divergence = self._divergence(outputs)
        if not self.has_head:
            return Outcome(divergence, None, None)
        logits = torch.cat(self._outputs[: len(outputs)])
        chosen, dense = torch.cat([output.argmax(1) for output in outputs]), logits.argmax(1)
        agrees = (chosen == dense).cpu()
        if self.targets is None:
            return Outcome(divergence, None, agrees)
        likely = (self._inverse_temperature * logits).softmax(1)
        margin = (likely.gather(1, dense.unsqueeze(1)) - likely.gather(1, chosen.unsqueeze(1))).squeeze(1)
        return Outcome(divergence, chosen.cpu() == self.targets[: len(chosen)], agrees, margin.double().cpu())


def inverse_temperature(logits: Tensor, targets: Tensor) -> float:
    """The factor on the logits under which the labels are likeliest (temperature scaling, arXiv 1706.04599).

    Args:
        logits: `(images, classes)`.
        targets: The labels, `(images,)`.

    Returns:
        A number from 0.1 to 10.
    """
    values, low, high = logits.double(), 0.1, 10.0
    label = values.gather(1, targets.unsqueeze(1)).mean()
    # The likelihood is concave in the factor; its slope is the labels' mean logit less the expected one.
    for _ in range(40):
        middle = math.sqrt(low * high)
        rising = label > ((middle * values).softmax(1) * values).sum(1).mean()
        low, high = (middle, high) if rising else (low, middle)
    return math.sqrt(low * high)
