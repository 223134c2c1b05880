"""What numbers may be: every argument that has limits, whoever gives it, and that nothing monstrous gets past them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from tokencut.errors import UsageError
from tokencut.limits import LIMITS, Limits, check_number
from tokencut.search.report import SearchSettings
from tokencut.sweeping.run import SweepPlan
from tokencut.training.recipe import RECIPES, TrainingRecipe
from tokencut.training.setup import TrainingSetup

MONSTERS = (math.inf, -math.inf, math.nan, 1e300, -1e300, 10**400, True, "7", None, [1])


@pytest.mark.parametrize("name", LIMITS)
def test_no_monster_is_let_through(name: str) -> None:
    for value in MONSTERS:
        with pytest.raises(UsageError, match=f"^`{name}="):
            check_number(name, value)
    check_number(name, LIMITS[name].example)


def test_bounds_are_in_the_limits_unless_they_are_open() -> None:
    shares, above = Limits(0, 1, 0.5), Limits(0, 1, 0.5, open=True)
    whole = Limits(1, 3, 2, whole=True)
    assert [shares.allow(value) for value in (0, 0.0, 1, 1.0, -1e-9, 1 + 1e-9)] == [True] * 4 + [False] * 2
    assert [above.allow(value) for value in (0, 1e-9, 1)] == [False, True, True]
    assert [whole.allow(value) for value in (1, 3, 2.0, 2.5, 0, 4)] == [True, True, True, False, False, False]
    assert [found.expected for found in (shares, above, whole)] == [
        "a number from 0 to 1", "a number above 0 and up to 1", "a whole number from 1 to 3",
    ]  # fmt: skip


def test_what_is_wrong_is_said_with_what_may_be_typed() -> None:
    with pytest.raises(UsageError, match=r"^`lr=inf` is not a number from 1e-12 to 10; type `lr=5e-05`$"):
        TrainingRecipe(lr=math.inf)
    with pytest.raises(UsageError, match=r"^`effort=inf` is not a number above 0 and up to 10000; type `effort=40`$"):
        check_number("effort", math.inf)


@pytest.mark.parametrize("settings", [*RECIPES.values(), TrainingSetup(), SearchSettings(), SweepPlan()])
def test_defaults_are_within_the_limits(settings: Any) -> None:
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if value is not None and entry.name in LIMITS:
            check_number(entry.name, value)


def test_every_number_of_a_recipe_has_limits() -> None:
    numbers = {entry.name for entry in fields(TrainingRecipe) if isinstance(entry.default, (int, float))}
    assert numbers - {"least_updates"} <= set(LIMITS)
