"""The methods: one file each, built from the primitives, found through the registry.

All that a method of your own needs is imported from here: what it sees, the decisions it gives, the primitives.

Every module of this package is imported, so that a file with a registered method is all that a new method takes.
Methods from other packages are found through the entry point group `tokencut.methods`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tokencut.attention import AttentionInfo, QueryKey
from tokencut.errors import TokencutError
from tokencut.methods import base
from tokencut.methods.base import FEATURE_KINDS, Method, StageInput, StageShape, option, register
from tokencut.ops.density_peaks import (
    PeakRule,
    density_average,
    density_clusters,
    nearest_centre,
    squared_distances,
    window_pairs,
    windows,
)
from tokencut.ops.exporting import exporting, numbers, pick, put, running, whole
from tokencut.ops.grid_clusters import ClusterRule, GridClusters, grid_clusters, grid_pool
from tokencut.ops.grid_groups import grid_groups, grid_groups_macs
from tokencut.ops.grouping import (
    Decision,
    GridGroups,
    Grouping,
    Selection,
    group_average,
    group_sum,
    in_order,
    membership,
    ordered_average,
)
from tokencut.ops.matching import in_turn, match_in_turn, match_pairs
from tokencut.ops.medoids import medoid_clusters
from tokencut.ops.merge_weights import WEIGHT_KINDS, raw_weights
from tokencut.ops.ranking import are_highest, ascending, by_attention, highest, ranking, take
from tokencut.schedule import Split, split_budget
from tokencut.tokens import Tokens

__all__ = [
    "AttentionInfo",
    "ClusterRule",
    "Decision",
    "FEATURE_KINDS",
    "GridClusters",
    "GridGroups",
    "Grouping",
    "Method",
    "PeakRule",
    "QueryKey",
    "Selection",
    "Split",
    "StageInput",
    "StageShape",
    "Tokens",
    "are_highest",
    "WEIGHT_KINDS",
    "as_recorded",
    "ascending",
    "by_attention",
    "density_average",
    "density_clusters",
    "exporting",
    "grid_clusters",
    "grid_groups",
    "grid_groups_macs",
    "grid_pool",
    "group_average",
    "group_sum",
    "highest",
    "in_order",
    "in_turn",
    "make_method",
    "match_in_turn",
    "match_pairs",
    "medoid_clusters",
    "membership",
    "methods",
    "nearest_centre",
    "numbers",
    "option",
    "ordered_average",
    "pick",
    "put",
    "ranking",
    "raw_weights",
    "register",
    "running",
    "split_budget",
    "squared_distances",
    "take",
    "window_pairs",
    "whole",
    "windows",
]


@cache
def _load_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="tokencut.methods"):
        try:
            entry.load()
        except Exception as error:  # a foreign package may raise anything; say whose it is
            package = entry.dist.name if entry.dist else entry.value
            raise TokencutError(f"the method {entry.name!r} of the package {package} cannot be loaded ({error}); "
                                f"update it, or type: pip uninstall {package}") from error  # fmt: skip


def methods(*, keeps_grid: bool | None = None) -> dict[str, type[Method]]:
    """The methods by name, in alphabetical order.

    Args:
        keeps_grid: Only those for hierarchical models, or only those for all others; all where None.
    """
    _load_all()
    found = sorted(base.methods().items())
    return {name: method for name, method in found if keeps_grid in (None, method.keeps_grid)}


def as_recorded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a recipe means; see `base.as_recorded`."""
    _load_all()
    return base.as_recorded(name, options)


def make_method(name: str, options: dict[str, object] | None = None) -> Method:
    """Builds a method from its name and settings; see `base.make_method`."""
    _load_all()
    return base.make_method(name, options)
