"""What the plain loop over blocks needs to know of a model family: the adapter protocol and its registry."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokencut.adapters.wrappers import instead_of
from tokencut.attention import AttentionInfo, TimmModule
from tokencut.calling import StandIn
from tokencut.cost import Macs, ModelCost
from tokencut.errors import ModelError, UsageError
from tokencut.schedule import Keep, Layers, Schedule, TokensOut, make_schedule
from tokencut.tokens import Tokens


@dataclass(frozen=True)
class Context:
    """What one block's attention is given beside features; made by `Adapter.context`, and read by that adapter alone.

    A family whose attention takes more, such as rotations by `Tokens.positions`, has a subclass with fields for it.

    Attributes:
        bias: What is added to the attention logits: `Tokens.bias`, to which a family may add its own for each pair of
            tokens, `(B, H, P + N, P + N)`. None for nothing.
    """

    bias: Tensor | None = None

    @staticmethod
    def of(bias: Tensor | None) -> Context:
        """The context of a bias, or of none."""
        return _NOTHING if bias is None else Context(bias)

    def block_arguments(self) -> dict[str, Any]:
        """The keyword arguments with which timm's model calls a block, for hooks on it to see."""
        return {} if self.bias is None else {"attn_mask": self.bias}

    def attention_arguments(self) -> dict[str, Any]:
        """The keyword arguments with which timm's block calls its attention."""
        return {"attn_mask": self.bias, "is_causal": False}

    def given(self, *, attn_mask: Tensor | None = None, is_causal: bool = False) -> Context:
        """The same context with such arguments as hooks have left them."""
        return self if attn_mask is self.bias else replace(self, bias=attn_mask)


_NOTHING = Context()


@dataclass(frozen=True)
class BareContext(Context):
    """`Context` of a block that takes no arguments beside features."""

    def block_arguments(self) -> dict[str, Any]:
        return {}

    def attention_arguments(self) -> dict[str, Any]:
        return {}

    def given(self, **arguments: Any) -> Context:
        return self


class Adapter(ABC):
    """Takes a timm model of one family apart, by its own sub-modules. Adapters hold no state: the model is an argument.

    A transformer block that reduces is run in two halves with the stage between: `attention_half` up to the stage,
    `mlp_half` behind it. Any other is run whole (`run`, `run_all`): by the model's own `forward`, or by such halves
    where those are quicker and do the same.

    Attributes:
        family: What users call it, for messages.
        timm_modules: The timm modules whose registered architectures this adapter takes.
        hierarchical: Whether the grid of tokens gets smaller between stages of blocks, so that only one of these can be
            reduced, and only to a smaller grid.
        runs_inside: Whether timm's own forward runs the model, with other code for the blocks that may reduce
            (`inside`), and its `forward_intermediates` gives a map for each stage of blocks.
        default_method: The method where nothing else is said.
    """

    family: ClassVar[str]
    timm_modules: ClassVar[tuple[str, ...]]
    hierarchical: ClassVar[bool] = False
    runs_inside: ClassVar[bool] = False
    default_method: ClassVar[str] = "bat"

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Whether the model is of this family (exact classes: a subclass may do something else in `forward`)."""

    def why_not(self, model: nn.Module) -> str | None:
        """What keeps a model that looks like one of this family from being taken; None where it does not look so."""
        return None

    @abstractmethod
    def check(self, model: TimmModule) -> None:
        """Refuses a model with a part that is not known.

        Raises:
            ModelError: With the class name of the block or attention layer.
        """

    def check_method(self, method: Any) -> None:
        """Refuses a method that cannot reduce such a model.

        Args:
            method: A `Method`.

        Raises:
            UsageError: Saying why, and which can.
        """
        if method.keeps_grid:
            raise UsageError(f"method {method.name} is for hierarchical models, whose blocks need tokens in a grid, "
                             f"and {self.family} is none; type another, such as `method={self.default_method!r}`"
                             )  # fmt: skip

    def schedule(self, model: TimmModule, keep: Keep | None, layers: Layers | None, reduce_by: int | None) -> Schedule:
        """What a user wrote, checked against the model; arguments as in `make_schedule`.

        Raises:
            UsageError: It does not fit the model.
        """
        return make_schedule(len(self.blocks(model)), keep, layers, reduce_by)

    def usual_layers(self, model: TimmModule, method: Any) -> Layers | None:
        """The layers that a method reduces where nothing else is said; None for those that the schedule takes."""
        return None

    def tokens_out(self, model: TimmModule, grid: tuple[int, ...], method: Any) -> TokensOut | None:
        """How many tokens can leave a method's stage, for images whose tokens stand in such a grid; None where any
        can.
        """
        return None

    def keep_note(self, model: TimmModule, keep: float, method: Any) -> str | None:
        """What a user should know of a keep rate of which a method has only the nearest here; None where it has all."""
        return None

    def feature_maps(self, model: TimmModule) -> int:
        """How many maps `forward_intermediates` of timm's model can give."""
        return len(self.blocks(model))

    @abstractmethod
    def num_prefix_tokens(self, model: TimmModule) -> int:
        """`P`, the number of prefix tokens."""

    @abstractmethod
    def grid(self, model: TimmModule, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an image of `height` x `width` px."""

    def frames(self, model: TimmModule) -> int | None:
        """Frames of the clips that the model takes, `(B, C, frames, H, W)`; None for images."""
        return None

    def grid_of(self, model: TimmModule, images: Tensor) -> tuple[int, ...]:
        """What images are cut into: rows and columns of patches, and before them tubelets along the frames of clips."""
        return self.grid(model, images.shape[-2], images.shape[-1])

    def own_grid(self, model: TimmModule) -> tuple[int, ...]:
        """The same for images, or clips, of the size that the model is built for."""
        size = self.input_size(model)
        assert size is not None
        return self.grid(model, *size)

    def changes(self, model: TimmModule, images: Tensor) -> Tensor:
        """How much each tubelet of clips differs from the one before at its place, fp32 `(B, N)` (`ops.static`); asked
        for of families with `frames`.
        """
        raise NotImplementedError

    @abstractmethod
    def input_size(self, model: TimmModule) -> tuple[int, int] | None:
        """Height and width in px of the images that the model was built for; None where it does not tell."""

    @abstractmethod
    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        """Height and width in px of what becomes one token before the first block."""

    @abstractmethod
    def classifier(self, model: TimmModule) -> nn.Module:
        """What makes logits of the pooled tokens `(B, D)`, its input; of two heads the class token's."""

    def num_classes(self, model: TimmModule) -> int:
        """The number of classes that the classifier tells apart, whoever put it there; 0 without one."""
        head: Any = self.classifier(model)
        layers = [part for part in (head, *reversed(list(head.modules()))) if hasattr(part, "out_features")]
        if not layers:
            return 0 if isinstance(head, nn.Identity) else int(model.num_classes)
        return int(layers[0].out_features)

    def separate_heads(self, model: TimmModule, apart: bool) -> bool:
        """Has a model of two heads give the logits of each, or their mean; False where it has only one."""
        return False

    @abstractmethod
    def blocks(self, model: TimmModule) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks, a sequence of modules."""

    @abstractmethod
    def embed(self, model: TimmModule, images: Tensor) -> Tokens:
        """Everything before the first block: images `(B, 3, H, W)` to tokens, with positions if blocks ask for them."""

    def looked_up(self, model: TimmModule) -> dict[str, Any]:
        """Arguments that timm looks up by the name of the weights, and has to be given for a model out of a file."""
        return {}

    def attention_note(self, model: TimmModule) -> str | None:
        """What keeps a GPU from its fastest attention in such a model, in a sentence; None where nothing does."""
        return None

    def refused_form(self, images: object) -> str | None:
        """Why images cannot be reduced in a form that timm's model takes, and what to give; None where they can."""
        return None

    def prepare(self, model: TimmModule, tokens: Tokens) -> Tokens:
        """Makes, behind a stage, what all blocks up to the next one share: `Tokens.shared`, which is still what the
        blocks before the stage had.
        """
        return tokens

    def reduced(self, model: TimmModule, entering: Tokens, leaving: Tokens, similar: bool) -> Tokens:
        """What travels behind a stage, for a family that gives patches their features back behind its blocks.

        Args:
            model: The model.
            entering: The tokens before the stage.
            leaving: The tokens behind it.
            similar: Whether the stage drops tokens or fuses unlike ones (not `Method.averages`).
        """
        return leaving

    def inside(self, model: TimmModule, run: Callable[[Tokens], Tokens]) -> StandIn:
        """timm's model with other code for the blocks that may reduce, of a family that `runs_inside`.

        Args:
            model: The model.
            run: Takes the tokens entering them, and gives those behind the last on the same grid.
        """
        raise NotImplementedError(f"{self.family} runs block by block")

    def recomputes(self, model: TimmModule) -> bool:
        """Whether timm is to compute activations again in backward (`set_grad_checkpointing`)."""
        return bool(getattr(model, "grad_checkpointing", False))

    def follows_patches(self, model: TimmModule) -> bool:
        """Whether blocks or head ask which patch went into which token, so that tokens always need a source map."""
        return False

    def entering(self, model: TimmModule, number: int, tokens: Tokens) -> Tokens:
        """The tokens as they enter a block, for a family in which a class token joins them on the way.

        Args:
            model: The model.
            number: The block's 1-based number.
            tokens: What left the block before, or what enters this one already.
        """
        return tokens

    def leaving(self, model: TimmModule, tokens: Tokens) -> Tokens:
        """What leaves the last block as the final norm sees it, for a family in which more follows than blocks."""
        return tokens

    def context(self, model: TimmModule, number: int, tokens: Tokens) -> Context:
        """What the attention of a block is given beside features.

        Args:
            model: The model.
            number: The block's 1-based number.
            tokens: The tokens entering the block.
        """
        return Context.of(tokens.bias)

    @abstractmethod
    def run(self, block: TimmModule, tokens: Tokens, context: Context) -> Tokens:
        """A whole block as timm runs it."""

    def run_all(self, model: TimmModule, first: int, blocks: Sequence[TimmModule], tokens: Tokens) -> Tokens:
        """Whole blocks, one after the other.

        Args:
            model: The model.
            first: The 1-based number of the first of them.
            blocks: The blocks.
            tokens: The tokens entering.
        """
        for number, block in enumerate(blocks, start=first):
            tokens = self.entering(model, number, tokens)
            tokens = self.run(block, tokens, self.context(model, number, tokens))
        return tokens

    def called_as_one(self, model: TimmModule) -> nn.Module | None:
        """What timm calls once to run all blocks, on which hooks run then; None where it calls them one by one."""
        blocks = self.blocks(model)
        return blocks if isinstance(blocks, nn.Sequential) else None

    def passed_by(self, model: TimmModule) -> list[nn.Module]:
        """Modules around the blocks that timm calls and the loop over blocks does not: hooks on them are refused."""
        return []

    def stood_in_for(self, block: TimmModule) -> list[nn.Module]:
        """The modules of a block whose `forward` the two halves take the place of: the block, its attention layers."""
        return [block]

    def stood_in(self, model: TimmModule, layers: tuple[int, ...]) -> list[tuple[int, nn.Module]]:
        """All modules of a model whose `forward` stages in these blocks (1-based) take the place of; each beside the
        block that has to be left out for it to run, 0 where there is none.
        """
        blocks = list(self.blocks(model))
        return [
            (layer, part) for layer in layers if layer <= len(blocks) for part in self.stood_in_for(blocks[layer - 1])
        ]

    @abstractmethod
    def attention_half(
        self, model: TimmModule, block: TimmModule, tokens: Tokens, context: Context
    ) -> tuple[Tokens, AttentionInfo]:
        """The first half of a reducing block, up to where its stage stands, and what its attention says."""

    @abstractmethod
    def mlp_half(self, block: TimmModule, tokens: Tokens) -> Tokens:
        """The second half of a reducing block, on the tokens that left its stage."""

    @abstractmethod
    def pre_mlp_norm(self, block: TimmModule, features: Tensor) -> Tensor:
        """Features as the second half's norm sees them, `(B, N, D)`; unchanged where there is no such norm."""

    @abstractmethod
    def final_norm(self, model: TimmModule, features: Tensor) -> Tensor:
        """The norm behind the last block, token by token: `(B, P + N, D)` to the same."""

    def head(self, model: TimmModule, tokens: Tokens) -> Tensor:
        """Final norm, pooling and classifier: logits `(B, classes)`. Average pooling is weighted by size."""
        return self.forward_head(model, tokens.with_features(self.final_norm(model, tokens.features)))

    def forward_head(self, model: TimmModule, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        """What `head` does behind the final norm, as timm's method of that name.

        Args:
            model: The model.
            tokens: Normed, `(B, P + N, D)`.
            pre_logits: Whether to stop before the classifier.
        """
        logits: Tensor = model.forward_head(tokens.features, pre_logits=pre_logits)
        return logits

    def pools_by_size(self, model: TimmModule) -> bool:
        """Whether what the head makes of merged tokens depends on their sizes."""
        return True

    @abstractmethod
    def cost(self, model: TimmModule) -> ModelCost:
        """The model's multiply-adds in pieces, for the closed form."""


_ADAPTERS: list[Adapter] = []


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: makes an adapter known to `adapter_for`."""
    _ADAPTERS.append(adapter())
    return adapter


def supported_modules() -> dict[str, tuple[str, ...]]:
    """The timm modules that are supported, by family."""
    return {adapter.family: adapter.timm_modules for adapter in _ADAPTERS}


def default_methods() -> dict[str, str]:
    """The method that is taken where none is named, by family."""
    return {adapter.family: adapter.default_method for adapter in _ADAPTERS}


def known_adapter(model: nn.Module) -> Adapter | None:
    """The adapter of a model's family; None where the family is not supported."""
    return next((adapter for adapter in _ADAPTERS if adapter.accepts(model)), None)


def adapter_for(model: nn.Module) -> Adapter:
    """Finds the adapter of a model.

    Raises:
        ModelError: The family is not supported, naming it and those that are; or a part of the model is not known.
    """
    adapter = known_adapter(model)
    if adapter is not None:
        adapter.check(model)
        return adapter
    why = next(filter(None, (adapter.why_not(model) for adapter in _ADAPTERS)), None)
    if why is not None:
        raise ModelError(f"{why}, which stages would pass by; keep timm's own, and make the change by a hook "
                         "(register_forward_hook) or around the model")  # fmt: skip
    instead = instead_of(model, lambda part: known_adapter(part) is not None)
    if instead is not None:
        raise ModelError(f"this {type(model).__name__} is {instead}")
    raise ModelError(
        f"{type(model).__name__} models are not supported; supported are: {', '.join(supported_modules())}; "
        "'tokencut models' lists the names"
    )


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds per token of all linear layers inside a module that applies each of them to every token once.

    Of what peft has put around a layer (LoRA) the adapters count that run: the active ones, if they are not merged.
    """
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    parts: list[Any] = list(module.children())
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        around: Any = module
        running = () if around.merged or around.disable_adapters else around.active_adapters
        parts = [around.base_layer]
        parts += [side[name] for name in running for side in (around.lora_A, around.lora_B) if name in side]
    return sum(map(linear_macs, parts))


def counted_macs(module: nn.Module, inputs: tuple[int, ...]) -> int:
    """Multiply-adds per image of what has no closed form, such as a backbone of convolutions before the first block.

    A copy without weights runs on the meta device, where nothing is computed, and each layer's output tells its count.

    Args:
        module: Any module whose products are convolutions (none of them transposed) and linear layers.
        inputs: The shape of its input for one image, such as `(3, H, W)`.
    """
    weights = [*module.parameters(), *module.buffers()]
    hollow = copy.deepcopy(module, {id(tensor): _without_storage(tensor) for tensor in weights}).eval()
    found: list[int] = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        weight: Any = layer.weight
        found.append(output.numel() * weight[0].numel())

    for layer in hollow.modules():
        layer._forward_hooks.clear()  # the model's own would see images that nobody gave
        layer._forward_pre_hooks.clear()
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            layer.register_forward_hook(note)
    with torch.no_grad():
        hollow(torch.empty(1, *inputs, dtype=weights[0].dtype, device="meta"))
    return sum(found)


def _without_storage(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def fused_attention_macs(query_width: int, value_width: int) -> Macs:
    """QK' and PV of one fused attention over all heads: `query_width` and `value_width` numbers a token."""
    return Macs(per_pair=query_width + value_width)
