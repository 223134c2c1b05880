"""The frozen, versioned description of a compressed model, and its JSON form.

Methods, and torch with them, are imported where they are needed: a recipe can be read without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tokencut.errors import ArtifactError, UsageError
from tokencut.messages import shorten
from tokencut.schedule import Schedule, StagePlan, TokensOut, make_schedule
from tokencut.schema import TEXT, TRUTH, WHOLE, Fields, Items, Rule, is_list_of, is_number, is_whole, optional

Setting = bool | int | float | str


def _is_keep(value: Any) -> bool:
    return value is None or is_number(value) or is_list_of(is_number, value)


# Ranges that depend on each other or on the model are the schedule's to check.
FIELDS = Fields({
    "method": TEXT,
    "method_options": Items(Rule(lambda value: isinstance(value, (bool, int, float, str)), "a setting"), named=True),
    "keep": Rule(_is_keep, "a number, a list of numbers, or null"),
    "layers": Items(WHOLE),
    "reduce_by": optional(WHOLE),
    "prop_attn": TRUTH,
    "tokens": Rule(lambda value: is_whole(value, 1), "a whole number of at least 1"),
    "stages": Items(Fields(dict.fromkeys(("block", "tokens_in", "tokens_out"), WHOLE))),
})  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What was done to a model.

    Attributes:
        method: Name of the reduction method.
        method_options: All its settings, defaults included, so that a later change of defaults changes no old recipe.
        schedule: The layers and keep rates as the user wrote them.
        prop_attn: Whether merged tokens weigh by their size in later attention.
        tokens: Image tokens at the recipe's input size.
        stages: The schedule resolved for that size; a layer that would remove nothing is not there.
    """

    method: str
    schedule: Schedule
    prop_attn: bool
    tokens: int
    stages: tuple[StagePlan, ...]
    method_options: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def keep(self) -> float | list[float] | None:
        """As in reports: one number, a list with one a layer, or None with `reduce_by`."""
        keep = self.schedule.keep
        return list(keep) if isinstance(keep, tuple) else keep

    @property
    def keeps(self) -> tuple[float, ...]:
        """The keep rates, each once; none with `reduce_by`."""
        keep = self.schedule.keep
        return () if keep is None else tuple(dict.fromkeys(keep if isinstance(keep, tuple) else (keep,)))

    @property
    def layers(self) -> list[int]:
        """The reducing layers, 1-based."""
        return list(self.schedule.layers)

    def stages_for(self, tokens: int, tokens_out: TokensOut | None = None) -> tuple[StagePlan, ...]:
        """The stages for an input of `tokens` image tokens; those stored where it is the recipe's own size.

        Args:
            tokens: The image tokens.
            tokens_out: How many can leave a stage, of a family that says so (`Adapter.tokens_out`).
        """
        known = tokens_out is None or all(tokens_out(s.tokens_in, s.tokens_out) == s.tokens_out for s in self.stages)
        if tokens == self.tokens and known:
            return self.stages
        if tokens_out is None:
            from tokencut.methods import make_method

            tokens_out = make_method(self.method, dict(self.method_options)).tokens_out
        return self.schedule.resolve(tokens, tokens_out)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {
            "method": self.method,
            "method_options": dict(self.method_options),
            "keep": self.keep,
            "layers": self.layers,
            "reduce_by": self.schedule.reduce_by,
            "prop_attn": self.prop_attn,
            "tokens": self.tokens,
            "stages": [asdict(stage) for stage in self.stages],
        }


def recipe_from_json(data: Any, depth: int, *, as_written: bool = False) -> Recipe:
    """Reads a recipe back, believing nothing: every field is checked for its type and range.

    Args:
        data: What `Recipe.to_json` gave, out of a file.
        depth: The number of blocks of the model it belongs to.
        as_written: Whether to leave out the settings that the method got later, for which methods are loaded.

    Raises:
        ArtifactError: A field is missing, unknown, of a wrong type, or out of range.
    """
    problem = FIELDS.problem(data)
    if problem:
        raise ArtifactError(f"the recipe{problem}; compress the model again")
    try:
        schedule = make_schedule(depth, data["keep"], data["layers"], data["reduce_by"])
    except (UsageError, TypeError) as error:
        raise ArtifactError(f"the recipe in the file does not fit its model: {error}") from error
    stages = _stages_from_json(data["stages"], schedule, data["tokens"])
    options = data["method_options"]
    if not as_written:
        from tokencut.methods import as_recorded

        options = as_recorded(data["method"], options)
    return Recipe(data["method"], schedule, data["prop_attn"], data["tokens"], stages, options)


def _stages_from_json(entries: list[dict[str, int]], schedule: Schedule, tokens: int) -> tuple[StagePlan, ...]:
    stages: list[StagePlan] = []
    for entry in entries:
        fits = (
            entry["block"] in schedule.layers
            and entry["tokens_in"] == (stages[-1].tokens_out if stages else tokens)
            and 1 <= entry["tokens_out"] < entry["tokens_in"]
            and (not stages or entry["block"] > stages[-1].block)
        )
        if not fits:
            raise ArtifactError(f"the recipe's stage {shorten(entry)} does not fit its model; compress the model again")
        stages.append(StagePlan(**entry))
    return tuple(stages)
