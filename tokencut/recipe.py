"""The frozen, versioned description of a compressed model, and its JSON form.

Methods, and torch with them, are imported where they are needed: a recipe can be read without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from tokencut.errors import ArtifactError, UsageError
from tokencut.messages import shorten
from tokencut.schedule import Schedule, StagePlan, TokensOut, kept_tokens, make_schedule
from tokencut.schema import (
    NUMBER,
    TEXT,
    TRUTH,
    WHOLE,
    Fields,
    Items,
    Rule,
    is_list_of,
    is_number,
    is_whole,
    optional,
)

Setting = bool | int | float | str


def _is_keep(value: Any) -> bool:
    return value is None or is_number(value) or is_list_of(is_number, value)


_RATE = Rule(lambda value: is_number(value) and 0 < value <= 1, "a number in (0, 1]")

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
    "static_keep": _RATE,
    "levels": Fields({"keeps": Items(_RATE), "limits": Items(NUMBER), "shares": Items(NUMBER)}),
}, partial=frozenset({"static_keep", "levels"}))  # fmt: skip


@dataclass(frozen=True)
class Levels:
    """A keep rate for each image, by how varied it is (`tokencut.ops.spread`).

    Attributes:
        keeps: The rates of the levels, in the order of the images' spread.
        limits: Ascending, one fewer: an image whose spread is at least `limits[i]` is in level `i + 1` or above.
        shares: Of the images that the limits were chosen by, which part is in each level.
    """

    keeps: tuple[float, ...]
    limits: tuple[float, ...]
    shares: tuple[float, ...]

    def problem(self) -> str | None:
        """What is wrong with them, for a message; None where nothing is."""
        if not self.keeps or len(self.limits) != len(self.keeps) - 1 or len(self.shares) != len(self.keeps):
            return f"has {len(self.keeps)} rates, {len(self.limits)} limits and {len(self.shares)} shares"
        if any(not before < after for before, after in pairwise(self.limits)):
            return "has limits that do not ascend"
        if any(share < 0 for share in self.shares) or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            return "has shares that do not add up to 1"
        return None


@dataclass(frozen=True)
class Recipe:
    """What was done to a model.

    Attributes:
        method: Name of the reduction method.
        method_options: All its settings, defaults included, so that a later change of defaults changes no old recipe.
        static_keep: The fraction of a clip's tubelets that enters the first block; None where all do.
        schedule: The layers and keep rates as the user wrote them.
        prop_attn: Whether merged tokens weigh by their size in later attention.
        tokens: Image tokens at the recipe's input size.
        stages: The schedule resolved for that size; a layer that would remove nothing is not there.
        levels: A keep rate for each image; the schedule is that of the highest then. None for one schedule.
    """

    method: str
    schedule: Schedule
    prop_attn: bool
    tokens: int
    stages: tuple[StagePlan, ...]
    method_options: Mapping[str, Setting] = field(default_factory=dict)
    static_keep: float | None = None
    levels: Levels | None = None

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

    def stages_for(self, tokens: int, tokens_out: TokensOut | None = None, places: int = 1) -> tuple[StagePlan, ...]:
        """The stages for an input of `tokens` image tokens; those stored where it is the recipe's own size.

        Args:
            tokens: The image tokens.
            tokens_out: How many can leave a stage, of a family that says so (`Adapter.tokens_out`).
            places: Of clips, the tokens of a frame.
        """
        known = tokens_out is None or all(tokens_out(s.tokens_in, s.tokens_out) == s.tokens_out for s in self.stages)
        if tokens == self.tokens and known:
            return self.stages
        if tokens_out is None:
            from tokencut.methods import make_method

            tokens_out = make_method(self.method, dict(self.method_options)).tokens_out
        return resolve_stages(self.schedule, self.static_keep, tokens, places, tokens_out)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        told: dict[str, Any] = {} if self.static_keep is None else {"static_keep": self.static_keep}
        if self.levels is not None:
            told["levels"] = {name: list(values) for name, values in asdict(self.levels).items()}
        return {
            **told,
            "method": self.method,
            "method_options": dict(self.method_options),
            "keep": self.keep,
            "layers": self.layers,
            "reduce_by": self.schedule.reduce_by,
            "prop_attn": self.prop_attn,
            "tokens": self.tokens,
            "stages": [asdict(stage) for stage in self.stages],
        }


def resolve_stages(
    schedule: Schedule, static_keep: float | None, tokens: int, places: int, tokens_out: TokensOut | None
) -> tuple[StagePlan, ...]:
    """The stages for an input: those of a schedule, behind one in block 0 where static tubelets are removed.

    Args:
        schedule: The schedule.
        static_keep: As in a recipe.
        tokens: Image tokens of the input.
        places: Of clips, the tokens of a frame, which is the least that stays.
        tokens_out: As `Schedule.resolve` takes it.
    """
    left = tokens if static_keep is None else min(max(kept_tokens(static_keep, tokens), places), tokens)
    first = () if left == tokens else (StagePlan(0, tokens, left),)
    return (*first, *schedule.resolve(left, tokens_out))


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
    static_keep = data.get("static_keep")
    blocks = schedule.layers if static_keep is None else (0, *schedule.layers)
    stages = _stages_from_json(data["stages"], blocks, data["tokens"])
    options = data["method_options"]
    if not as_written:
        from tokencut.methods import as_recorded

        options = as_recorded(data["method"], options)
    levels = _levels_from_json(data.get("levels"), schedule)
    return Recipe(data["method"], schedule, data["prop_attn"], data["tokens"], stages, options, static_keep, levels)


def _levels_from_json(data: dict[str, list[float]] | None, schedule: Schedule) -> Levels | None:
    if data is None:
        return None
    levels = Levels(**{name: tuple(map(float, values)) for name, values in data.items()})
    problem = levels.problem()
    if problem is None and schedule.keep != max(levels.keeps):
        problem = f"has {max(levels.keeps):g} as its highest rate, and the schedule keeps {schedule.keep}"
    if problem is not None:
        raise ArtifactError(f"the recipe's field levels {problem}; compress the model again")
    return levels


def _stages_from_json(entries: list[dict[str, int]], blocks: tuple[int, ...], tokens: int) -> tuple[StagePlan, ...]:
    stages: list[StagePlan] = []
    for entry in entries:
        fits = (
            entry["block"] in blocks
            and entry["tokens_in"] == (stages[-1].tokens_out if stages else tokens)
            and 1 <= entry["tokens_out"] < entry["tokens_in"]
            and (not stages or entry["block"] > stages[-1].block)
        )
        if not fits:
            raise ArtifactError(f"the recipe's stage {shorten(entry)} does not fit its model; compress the model again")
        stages.append(StagePlan(**entry))
    return tuple(stages)
