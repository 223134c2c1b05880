"""What a reduction method is, what it sees, and the registry: a new method adds a file and edits none."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tokencut.attention import AttentionInfo
from tokencut.errors import UsageError
from tokencut.messages import nearest_known
from tokencut.ops.grouping import Decision
from tokencut.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class StageInput:
    """What a method sees of one stage.

    Attributes:
        tokens: The tokens entering, `N` image tokens.
        attention: What the block's attention says about them.
        norm: The norm behind the stage (`norm2`), for methods that compare normed features.
        learned: What `Method.make_module` built for this stage.
    """

    tokens: Tokens
    attention: AttentionInfo
    norm: Callable[[Tensor], Tensor]
    learned: nn.Module | None = None

    def features(self, kind: str) -> Tensor:
        """Image tokens as points to be compared, `(B, N, F)` in the dtype they have; compare them in fp32.

        Args:
            kind: `tokens` (the features as they are), `unit` (the same, scaled to length 1), `normed` (behind
                `norm2`) or `keys` (averaged over heads).
        """
        if kind == "keys":
            return self.attention.keys()
        if kind == "tokens":
            return self.tokens.image
        if kind == "unit":
            return F.normalize(self.tokens.image.float(), dim=2)
        # The prefix tokens are normed along: slicing them off before would copy all the others.
        return self.norm(self.tokens.features)[:, self.tokens.num_prefix_tokens :]


FEATURE_KINDS = ("tokens", "unit", "normed", "keys")


@dataclasses.dataclass(frozen=True)
class StageShape:
    """Sizes of a stage, for its closed-form cost: image tokens entering and leaving, feature and key width; and, where
    tokens stand in windows, how many there are, the places of each before the stage and behind it, and the grid's rows
    and columns.
    """

    tokens: int
    budget: int
    width: int
    key_width: int
    windows: int = 0
    places: int = 0
    places_left: int = 0
    grid: tuple[int, int] = (0, 0)

    def feature_width(self, kind: str) -> int:
        """Width of `StageInput.features(kind)`."""
        return self.key_width if kind == "keys" else self.width


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, low: float | None = None,
           high: float | None = None, formerly: Any = None) -> Any:  # fmt: skip
    """A setting of a method: its default, what it does, and the values it may take.

    Args:
        default: Its type is the setting's type: bool, int, float or str.
        help: What it does, in one line.
        choices: Allowed strings.
        low: Smallest number allowed.
        high: Largest number allowed.
        formerly: For a setting that came later: the value with which the method does as it did before, which is what a
            recipe means that does not name it; the default where None.
    """
    limits = {"help": help, "choices": choices, "low": low, "high": high, "formerly": formerly}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """A method: a frozen set of settings, and a decision for a stage.

    A subclass is a frozen dataclass whose fields are made by `option`, registered with `@register`.

    Attributes:
        name: What users call it by.
        source: The paper.
        prop_attn: Whether proportional attention is on where the user says nothing.
        needs_training: Whether its stages hold weights that mean nothing before they are fine-tuned.
        keeps_grid: Whether the tokens that leave stand in a regular grid, which models with windows, pooling or
            convolutions between their blocks need. Its stages stand before a block then, and each token is given back
            behind the last.
        each_block: Whether all tokens stay, and it decides before each block from its own on which of them share
            what the MLP does (`GridGroups`).
        presets: Named sets of settings, chosen by the setting `preset`; single settings beside it win.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    prop_attn: ClassVar[bool]
    needs_training: ClassVar[bool] = False
    keeps_grid: ClassVar[bool] = False
    each_block: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def decide(self, stage_input: StageInput, budget: int) -> Decision:
        """Decides which image tokens stay, merge or go; called under `no_grad` with autocast off.

        Args:
            stage_input: The tokens entering, and what attention says about them.
            budget: `M`, the image tokens that leave, `1 <= M < N`.

        Returns:
            A `Selection` or `Grouping` of exactly `budget` tokens, the same for an image alone or in any batch.
        """

    @abstractmethod
    def macs(self, shape: StageShape) -> int:
        """Multiply-adds per image of the method's own products; carrying a decision out only gathers and adds."""

    @abstractmethod
    def merges(self) -> bool:
        """Whether `decide` returns a `Grouping` (sizes are tracked) rather than a `Selection`."""

    def averages(self) -> bool:
        """Whether each token leaving is an average of similar ones, so that what it changes by holds for all of them.

        Otherwise, where tokens are dropped or unlike ones fused into one, un-merging looks for the most similar left.
        """
        return self.merges()

    def reads_attention(self) -> bool:
        """Whether `decide` asks for class attention (once), whose row is then computed beside the block's attention."""
        return True

    def tokens_out(self, tokens: int, budget: int) -> int:
        """How many of `tokens` image tokens leave a stage with this budget; another number only as published."""
        return budget

    def attentive(self, tokens: int, budget: int) -> int:
        """How many of `tokens` image tokens count as attentive when fine-tuning asks; as many as leave by default."""
        return budget

    def make_module(self, width: int, seed: int) -> nn.Module | None:
        """What a stage of this method learns, for features of `width` numbers; the same weights for the same `seed`."""
        return None

    def soft_policy(self, stage_input: StageInput) -> Tensor | None:
        """A differentiable stand-in for `decide` while training, for a method that learns what to drop.

        No token leaves the stage then; those that would are hidden from the attention of later blocks.

        Returns:
            `Tokens.policy`, `(B, N)`; None where training goes through `decide` as well.
        """
        return None

    def options(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)


_METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Class decorator: makes a method known under its `name`.

    Raises:
        UsageError: Another class has that name.
    """
    taken = _METHODS.get(method.name, method)
    if (taken.__module__, taken.__qualname__) != (method.__module__, method.__qualname__):
        raise UsageError(f"the method name {method.name!r} is taken by {taken.__module__}.{taken.__qualname__}; write "
                         f"another one into {method.__module__}.{method.__qualname__}, such as "
                         f"name = 'my_{method.name}'")  # fmt: skip
    _METHODS[method.name] = method
    return method


def methods() -> Mapping[str, type[Method]]:
    """All registered methods by name, the package's own first."""
    return _METHODS


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Builds a method from its name and settings.

    Args:
        name: A registered name.
        options: Settings by name; strings are read as the setting's type.

    Raises:
        UsageError: No method or setting of that name (the nearest is offered), or a value that does not fit.
    """
    if name not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise UsageError(f"unknown method {name!r}{nearest_known(name, _METHODS)} methods are {known}")
    method = _METHODS[name]
    fields = {field.name: field for field in dataclasses.fields(method)}
    chosen = dict(options or {})
    if "preset" in chosen:
        chosen = {**_preset(method, str(chosen.pop("preset"))), **chosen}
    values = {}
    for key, value in chosen.items():
        if key not in fields:
            known = f"its settings are {', '.join(fields)}" if fields else "it has no settings"
            raise UsageError(f"method {name} has no setting {key!r}{nearest_known(key, fields)} {known}")
        values[key] = _read(name, fields[key], value)
    return method(**values)


def as_recorded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a recipe means, with those that came after it as the method was before them.

    Args:
        name: The method; the settings are returned as they are where there is none of that name.
        options: The settings that the recipe names.
    """
    fields = dataclasses.fields(_METHODS[name]) if name in _METHODS else ()
    former = {field.name: field.metadata["formerly"] for field in fields if field.metadata["formerly"] is not None}
    return {**former, **options}


_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _preset(method: type[Method], name: str) -> Mapping[str, Any]:
    if name not in method.presets:
        known = f"its presets are {', '.join(method.presets)}" if method.presets else "it has none"
        raise UsageError(f"method {method.name} has no preset {name!r}{nearest_known(name, method.presets)} {known}")
    return method.presets[name]


def _read(method: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """A setting's value in its own type, checked."""
    default: Any = field.default
    kind, limits = type(default), field.metadata
    shown = str(default).lower() if kind is bool else default
    wrong = UsageError(f"setting {field.name}={value} of method {method} is not {_expected(kind, limits)}; the default "
                       f"is {field.name}={shown}")  # fmt: skip
    if kind is bool:
        word = str(value).lower()
        if word not in _TRUE + _FALSE:
            raise wrong
        return word in _TRUE
    try:
        read = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if limits["choices"] is not None and read not in limits["choices"]:
        raise wrong
    if kind in (int, float):
        low = float("-inf") if limits["low"] is None else limits["low"]
        high = float("inf") if limits["high"] is None else limits["high"]
        if not (low <= read <= high and abs(read) < math.inf) or (kind is int and float(value) != read):
            raise wrong
    return read


def _expected(kind: type, limits: Mapping[str, Any]) -> str:
    if limits["choices"] is not None:
        return "one of " + ", ".join(limits["choices"])
    if kind is bool:
        return "true or false"
    number = "a whole number" if kind is int else "a number"
    if limits["low"] is not None and limits["high"] is not None:
        return f"{number} from {limits['low']} to {limits['high']}"
    return number if limits["low"] is None else f"{number} of at least {limits['low']}"
