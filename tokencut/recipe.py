"""The frozen, versioned description of a compressed model, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tokencut.errors import ArtifactError, UsageError
from tokencut.messages import shorten
from tokencut.methods import make_method
from tokencut.schedule import Schedule, StagePlan, make_schedule

Setting = bool | int | float | str


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
    def layers(self) -> list[int]:
        """The reducing layers, 1-based."""
        return list(self.schedule.layers)

    def stages_for(self, tokens: int) -> tuple[StagePlan, ...]:
        """The stages for an input of `tokens` image tokens; those stored where it is the recipe's own size."""
        if tokens == self.tokens:
            return self.stages
        return self.schedule.resolve(tokens, make_method(self.method, dict(self.method_options)).tokens_out)

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


def recipe_from_json(data: Any, depth: int) -> Recipe:
    """Reads a recipe back, believing nothing: every field is checked for its type and range.

    Args:
        data: What `Recipe.to_json` gave, out of a file.
        depth: The number of blocks of the model it belongs to.

    Raises:
        ArtifactError: A field is missing, unknown, of a wrong type, or out of range.
    """
    wanted: dict[str, Any] = {
        "method": str, "method_options": dict, "keep": (int, float, list, type(None)), "layers": list,
        "reduce_by": (int, type(None)), "prop_attn": bool, "tokens": int, "stages": list,
    }  # fmt: skip
    if not isinstance(data, dict) or set(data) != set(wanted):
        raise ArtifactError(f"the recipe in the file should have the fields {', '.join(sorted(wanted))}; "
                            "it is damaged or was not written by tokencut: compress the model again")  # fmt: skip
    for name, kind in wanted.items():
        value = data[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ArtifactError(f"the recipe's {name} is {shorten(value)}, of a wrong type; compress the model again")
    if data["tokens"] < 1:
        raise ArtifactError(f"the recipe's tokens is {shorten(data['tokens'])}, less than 1; compress the model again")
    for name, value in data["method_options"].items():
        if not isinstance(value, (bool, int, float, str)):
            raise ArtifactError(f"the recipe's setting {shorten(name)} is {shorten(value)}, of a wrong type; "
                                "compress the model again")  # fmt: skip
    try:
        schedule = make_schedule(depth, data["keep"], data["layers"], data["reduce_by"])
    except (UsageError, TypeError) as error:
        raise ArtifactError(f"the recipe in the file does not fit its model: {error}") from error
    stages = _stages_from_json(data["stages"], schedule, data["tokens"])
    return Recipe(data["method"], schedule, data["prop_attn"], data["tokens"], stages, data["method_options"])


def _stages_from_json(entries: list[Any], schedule: Schedule, tokens: int) -> tuple[StagePlan, ...]:
    stages: list[StagePlan] = []
    for entry in entries:
        fits = (
            isinstance(entry, dict)
            and set(entry) == {"block", "tokens_in", "tokens_out"}
            and all(type(value) is int for value in entry.values())
            and entry["block"] in schedule.layers
            and entry["tokens_in"] == (stages[-1].tokens_out if stages else tokens)
            and 1 <= entry["tokens_out"] < entry["tokens_in"]
            and (not stages or entry["block"] > stages[-1].block)
        )
        if not fits:
            raise ArtifactError(f"the recipe's stage {shorten(entry)} does not fit its model; compress the model again")
        stages.append(StagePlan(**entry))
    return tuple(stages)
