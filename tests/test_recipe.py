"""A recipe's JSON form: there and back, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokencut.errors import ArtifactError
from tokencut.methods import make_method
from tokencut.recipe import Recipe, recipe_from_json
from tokencut.schedule import StagePlan, make_schedule

SETTINGS = {"pairs": 0.5, "features": "keys", "neighbours": 5, "density": "published", "keep_norm": False}
DEPTH = 12


def make_recipe(keep: Any = 0.7, layers: Any = None, reduce_by: int | None = None) -> Recipe:
    schedule = make_schedule(DEPTH, keep, layers, reduce_by)
    return Recipe("bat", schedule, True, 196, schedule.resolve(196), SETTINGS)


def as_written(recipe: Recipe) -> Any:
    return json.loads(json.dumps(recipe.to_json()))


@pytest.mark.parametrize(
    "recipe",
    [
        make_recipe(),
        make_recipe(keep=1.0),
        make_recipe(keep=[0.9, 0.5], layers=[2, 3]),
        make_recipe(keep=None, reduce_by=13),
    ],
    ids=["one keep", "nothing removed", "a keep per layer", "reduce by"],
)
def test_there_and_back(recipe: Recipe) -> None:
    assert recipe_from_json(as_written(recipe), DEPTH) == recipe


def test_what_is_written() -> None:
    # ceil(0.7 * 196) = ceil(137.2) = 138; ceil(0.7 * 138) = ceil(96.6) = 97; ceil(0.7 * 97) = ceil(67.9) = 68.
    assert make_recipe().to_json() == {
        "method": "bat",
        "method_options": SETTINGS,
        "keep": 0.7,
        "layers": [4, 7, 10],
        "reduce_by": None,
        "prop_attn": True,
        "tokens": 196,
        "stages": [
            {"block": 4, "tokens_in": 196, "tokens_out": 138},
            {"block": 7, "tokens_in": 138, "tokens_out": 97},
            {"block": 10, "tokens_in": 97, "tokens_out": 68},
        ],
    }


def test_a_setting_that_came_later_is_what_the_method_did_before() -> None:
    written = as_written(make_recipe())
    for name in ("density", "keep_norm"):
        del written["method_options"][name]
    assert recipe_from_json(written, DEPTH) == make_recipe()
    built = make_method("bat", dict(recipe_from_json(written, DEPTH).method_options))
    assert (built.density, built.keep_norm) == ("published", False)  # type: ignore[attr-defined]


def test_another_input_size_is_resolved_anew_and_the_own_one_is_not() -> None:
    recipe = make_recipe()
    assert recipe.stages_for(196) is recipe.stages
    assert recipe.stages_for(100)[0] == StagePlan(4, 100, 70)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", 3, "the recipe's method is 3, not a string"),
        ("prop_attn", 1, "the recipe's prop_attn is 1, not true or false"),
        ("tokens", True, "the recipe's tokens is True, not a whole number of at least 1"),
        ("tokens", 0, "the recipe's tokens is 0, not a whole number of at least 1"),
        ("keep", "0.7", "the recipe's keep is '0.7', not a number, a list of numbers, or null"),
        ("keep", 1.2, "keep 1.2 is not in (0, 1]"),
        ("keep", [0.7], "1 keep rates for 3 layers"),
        ("keep", ["0.7", "0.7", "0.7"], "the recipe's keep is ['0.7', '0.7', '0.7'], not a number, a list"),
        ("keep", None, "not both and not neither"),
        ("reduce_by", 5, "not both and not neither"),
        ("layers", "all", "the recipe's layers is 'all', not a list"),
        ("layers", [4, 7, 13], "layer 13 does not exist"),
        ("layers", [[4], 7, 10], "the recipe's layers[0] is [4], not a whole number"),
        ("method_options", {"pairs": [0.5]}, "the recipe's method_options['pairs'] is [0.5], not a setting"),
        ("stages", [4], "the recipe's stages[0] is 4, not an object"),
        ("stages", [{"block": 4, "tokens_in": 195, "tokens_out": 138}], "does not fit its model"),
        ("stages", [{"block": 5, "tokens_in": 196, "tokens_out": 138}], "does not fit its model"),
        ("stages", [{"block": 4, "tokens_in": 196, "tokens_out": 196}], "does not fit its model"),
        ("stages", [{"block": 4, "tokens_in": 196, "tokens_out": 0}], "does not fit its model"),
        (
            "stages",
            [{"block": 4, "tokens_in": 196, "tokens_out": 138.0}],
            "the recipe's stages[0].tokens_out is 138.0, not a whole number",
        ),
        (
            "stages",
            [{"block": 7, "tokens_in": 196, "tokens_out": 138}, {"block": 4, "tokens_in": 138, "tokens_out": 97}],
            "does not fit its model",
        ),
        ("extra", 1, "the recipe has an unknown field extra"),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(field: str, value: Any, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        recipe_from_json({**as_written(make_recipe()), field: value}, DEPTH)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "the recipe is None, not an object"),
        ([], r"the recipe is \[\], not an object"),
        ({}, "the recipe has no field keep"),
        ({"method": "bat"}, "the recipe has no field keep"),
    ],
)
def test_something_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"^{message}; compress the model again$"):
        recipe_from_json(data, DEPTH)


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(ArtifactError) as caught:
        recipe_from_json({**as_written(make_recipe()), "method": ["x" * 1000]}, DEPTH)
    assert len(str(caught.value)) < 150
