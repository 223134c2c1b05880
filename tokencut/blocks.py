"""The blocks of a model and the stages between their halves: the only place that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokencut.adapters import Adapter, Context
from tokencut.attention import TimmModule, attention_bias
from tokencut.calling import call, is_bare
from tokencut.errors import ModelError
from tokencut.methods import Method, StageInput
from tokencut.ops.static import without_static
from tokencut.schedule import StagePlan
from tokencut.tokens import Grouped, Tokens, apply_decision, full_precision, without_gradient
from tokencut.tracing import BlockObserver


class Stage(nn.Module):
    """One reduction: decides by its method, and carries the decision out.

    Holds settings only, no parameter, but for a method that learns (`Method.make_module`): `learned`, else None.
    """

    def __init__(self, method: Method, learned: nn.Module | None = None) -> None:
        super().__init__()
        self.method = method
        self.learned = learned

    def forward(self, stage_input: StageInput, budget: int) -> Tokens:
        """Reduces the image tokens that enter to `budget`.

        Args:
            stage_input: The tokens entering, `(B, P + N, D)`, and what attention says about them.
            budget: `M`, the image tokens leaving.

        Returns:
            The tokens leaving, `(B, P + M, D)`; all of them where the method hides tokens while it trains.
        """
        if self.learned is not None:
            stage_input = replace(stage_input, learned=self.learned)
        # Decided in fp32 whatever the model runs in, so that selection does not change with precision.
        with full_precision(stage_input.tokens.features.device):
            policy = self.method.soft_policy(stage_input) if self.training else None
            if policy is not None:
                return replace(stage_input.tokens, policy=policy)
            with without_gradient():
                decision = self.method.decide(stage_input, budget)
        return apply_decision(stage_input.tokens, decision)

    def extra_repr(self) -> str:
        return repr(self.method)


@dataclass(frozen=True)
class BlockLoop:
    """A model from images to logits, block by block; it keeps nothing from one call to the next.

    Attributes:
        adapter: The model's adapter.
        model: timm's model.
        stages: The `Stage` of each block that may reduce, by 1-based block number.
        proportional: Whether merged tokens weigh by size in attention.
        blocks: The model's blocks.
        static: What leaves before the first block, where static tubelets of clips are removed there; None where not.
    """

    adapter: Adapter
    model: TimmModule
    stages: Mapping[int, Any]
    proportional: bool
    blocks: Sequence[TimmModule]
    static: StagePlan | None = None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def embed(self, images: Tensor, *, source: bool = False, observer: BlockObserver | None = None) -> Tokens:
        """The tokens entering the first block.

        Args:
            images: `(B, 3, H, W)`.
            source: Whether to follow from here on which patch goes into which token.
            observer: Is told of static tubelets that were removed.
        """
        tokens = self.begun(self.adapter.embed(self.model, images), source=source)
        if self.static is None:
            return tokens
        with full_precision(images.device), torch.no_grad():
            changed = self.adapter.changes(self.model, images)
            if changed.shape[1] != tokens.count:
                raise ModelError(f"patch dropout left {tokens.count} of {changed.shape[1]} tubelets, and static ones "
                                 "cannot be told; type model.eval(), or build the model with patch_drop_rate=0"
                                 )  # fmt: skip
            places = prod(self.adapter.grid_of(self.model, images)[1:])
            decision = without_static(changed, places, self.static.tokens_out)
        left = self.weighed(apply_decision(tokens, decision))
        if observer is not None:
            observer.stage(self.static, tokens, left, None)
        return left

    def begun(self, tokens: Tokens, *, source: bool = False) -> Tokens:
        """The tokens entering the first block, as `embed` gives them, of those that the family makes.

        Args:
            tokens: What the adapter has made.
            source: As in `embed`.
        """
        tokens = self._biased(tokens)
        if not (source or self.adapter.follows_patches(self.model)):
            return tokens
        numbers = torch.arange(tokens.count, device=tokens.features.device)
        return replace(tokens, source=numbers.expand(tokens.features.shape[0], -1))

    def weighed(self, tokens: Tokens) -> Tokens:
        """The tokens that left a stage, with all that blocks up to the next one share: what attention adds to their
        logits for their sizes and their policy, and what the family makes of them.
        """
        return self.adapter.prepare(self.model, self._biased(tokens))

    def _biased(self, tokens: Tokens) -> Tokens:
        bias = attention_bias(tokens, self.proportional)
        return tokens if bias is tokens.bias else tokens.with_bias(bias)

    def step(
        self, number: int, tokens: Tokens, tokens_out: int | None = None, observer: BlockObserver | None = None
    ) -> Tokens:
        """Runs one block.

        Args:
            number: Its 1-based number.
            tokens: The tokens entering, as `embed`, `weighed` or the step before gave them.
            tokens_out: The image tokens leaving its stage. None, or as many as enter, for the block as timm runs it.
            observer: Is told of the stage.

        Returns:
            The block's output.
        """
        tokens = self.adapter.entering(self.model, number, tokens)
        if tokens_out is None or tokens_out == tokens.count:
            return self._whole(number, self._regrouped(number, tokens))
        if self.adapter.hierarchical:
            return self._whole(number, self.smaller(number, tokens, tokens_out, observer))
        context, block = self.adapter.context(self.model, number, tokens), self._block(number)
        if is_bare(block):
            return self._reduced(number, tokens, context, tokens_out, observer)
        left = tokens

        def staged(features: Tensor, **given: Any) -> Tensor:
            nonlocal left
            left = self._reduced(number, tokens.with_features(features), context.given(**given), tokens_out, observer)
            return left.features

        # Hooks on the block and wrappers around it see what they see of a block that timm runs.
        features = call(block, staged, tokens.features, **context.block_arguments())
        self._check_gradient(number, left)
        return left.with_features(features)

    def _reduced(
        self, number: int, tokens: Tokens, context: Context, tokens_out: int, observer: BlockObserver | None
    ) -> Tokens:
        """The output of a block with a stage between its halves; arguments as in `step`."""
        stage_input, stage = self.stage_input(number, tokens, context), self.stages[number]
        left, similar = stage(stage_input, tokens_out), not stage.method.averages()
        left = self.weighed(self.adapter.reduced(self.model, stage_input.tokens, left, similar))
        if observer is not None:
            plan = StagePlan(number, tokens.count, tokens_out)
            observer.stage(plan, stage_input.tokens, left, stage_input.attention)
        return self.mlp_half(number, left)

    def smaller(self, number: int, tokens: Tokens, tokens_out: int, observer: BlockObserver | None = None) -> Tokens:
        """Runs a stage that stands before its block, as those of hierarchical models do; arguments as in `step`."""
        stage_input = self.stage_input(number, tokens)
        left = self.stages[number](stage_input, tokens_out)
        if left.clustered is not None:
            left = self.weighed(replace(left, clustered=replace(left.clustered, block=number)))
        if left.grouped is not None:
            left = replace(left, grouped=replace(left.grouped, block=number))
        if observer is not None:
            observer.stage(StagePlan(number, tokens.count, tokens_out), tokens, left, stage_input.attention)
        return left

    def _regrouped(self, number: int, tokens: Tokens) -> Tokens:
        """The tokens before a block, in other groups where a stage has grouped them before an earlier one."""
        if tokens.grouped is None or tokens.grouped.groups is None:
            return tokens
        left: Tokens = self.stages[tokens.grouped.block](self.stage_input(number, tokens), tokens.runs)
        return left

    def stage_input(self, number: int, tokens: Tokens, context: Context | None = None) -> StageInput:
        """Runs the first half of a block: what a stage in its middle sees.

        Args:
            number: The block's 1-based number.
            tokens: The tokens entering it.
            context: What its attention is given beside features, for tokens as they enter; where None the adapter says
                both.
        """
        block, adapter = self._block(number), self.adapter
        if context is None:
            tokens = adapter.entering(self.model, number, tokens)
            context = adapter.context(self.model, number, tokens)
        half, attention = adapter.attention_half(self.model, block, tokens, context)
        return StageInput(half, attention, lambda features: adapter.pre_mlp_norm(block, features))

    def mlp_half(self, number: int, tokens: Tokens) -> Tokens:
        """Runs the second half of a block on the tokens that left its stage."""
        return self.adapter.mlp_half(self._block(number), tokens)

    def run(self, tokens: Tokens, plans: Sequence[StagePlan], observer: BlockObserver | None = None,
            depth: int | None = None) -> Tokens:  # fmt: skip
        """Runs one block after the other.

        Args:
            tokens: The tokens entering the first block.
            plans: The stages, by their blocks.
            observer: Is told of every stage and block.
            depth: How many blocks to run; all where None.

        Returns:
            The tokens behind the last block that ran, before the final norm.
        """
        if any(self._method(plan.block).each_block for plan in plans if plan.block):
            tokens = replace(tokens, grouped=Grouped())
        last = self.depth if depth is None else depth
        start = 1
        for plan in plans:
            if not start <= plan.block <= last:
                continue  # static tubelets have left before
            tokens = self._plain(start, plan.block, tokens, observer)
            tokens = self.step(plan.block, tokens, plan.tokens_out, observer)
            if observer is not None:
                observer.block(plan.block, tokens)
            start = plan.block + 1
        return self.adapter.leaving(self.model, self._plain(start, last + 1, tokens, observer))

    def head(self, tokens: Tokens) -> Tensor:
        """Final norm, pooling and classifier: logits `(B, classes)`, features `(B, D)` of a model without classes."""
        return self.adapter.head(self.model, self.adapter.leaving(self.model, tokens))

    def _plain(self, start: int, stop: int, tokens: Tokens, observer: BlockObserver | None) -> Tokens:
        """Blocks without a stage, of numbers from `start` up to `stop`, which is not among them."""
        if observer is None and tokens.grouped is None and not self._recomputes():
            return self.adapter.run_all(self.model, start, self.blocks[start - 1 : stop - 1], tokens)
        for number in range(start, stop):
            tokens = self.step(number, tokens)
            if observer is not None:
                observer.block(number, tokens)
        return tokens

    def _recomputes(self) -> bool:
        """Whether activations are computed again in backward."""
        return torch.is_grad_enabled() and self.adapter.recomputes(self.model)

    def _method(self, number: int) -> Method:
        stage: Any = self.stages[number]
        method: Method = stage.method
        return method

    def _block(self, number: int) -> TimmModule:
        return self.blocks[number - 1]

    def _check_gradient(self, number: int, left: Tokens) -> None:
        """Refuses a checkpoint that has cut off what a stage learns by."""
        if left.policy is None or not torch.is_grad_enabled() or left.policy.requires_grad:
            return
        if any(weight.requires_grad for weight in self.stages[number].parameters()):
            raise ModelError(f"block {number} is checkpointed in torch's reentrant way, and its stage cannot learn; "
                             "give checkpoint_wrapper its `checkpoint_impl=CheckpointImpl.NO_REENTRANT`")  # fmt: skip

    def _whole(self, number: int, tokens: Tokens) -> Tokens:
        """A block as timm runs it; activations are computed again in backward where timm would."""
        block, context = self._block(number), self.adapter.context(self.model, number, tokens)
        if not self._recomputes():
            return self.adapter.run(block, tokens, context)

        # The features are an argument: by them `checkpoint` finds the device whose random state it has to restore.
        features = checkpoint(
            lambda features: self.adapter.run(block, tokens.with_features(features), context).features,
            tokens.features,
            use_reentrant=False,
        )
        return tokens.with_features(features)
