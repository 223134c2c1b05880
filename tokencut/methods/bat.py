"""Token decoupling and merging: "Beyond Attentive Tokens", arXiv 2211.11315."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokencut.methods.base import FEATURE_KINDS, Method, StageInput, StageShape, option, register
from tokencut.ops.density_peaks import PeakRule, density_average, density_clusters, window_pairs, windows
from tokencut.ops.exporting import numbers, pick, put, running
from tokencut.ops.grouping import Decision, Selection, ordered_average
from tokencut.ops.matching import in_turn, match_in_turn
from tokencut.ops.merge_weights import WEIGHT_KINDS, raw_weights
from tokencut.ops.ranking import by_attention, highest, take
from tokencut.schedule import Split, split_budget


@register
@dataclass(frozen=True)
class Bat(Method):
    """Attentive tokens are kept apart and matched in pairs, inattentive ones clustered around density peaks.

    `preset=paper` (with `prop_attn=False`) is the paper's own rule, whose density depends on the scale of a model's
    features. Single settings take parts away: `pairs=0` the matching, `inattentive=drop` the clustering, both the
    diversity (importance only), `clusters=1` the decoupling (diversity only).

    The defaults are what measured best without fine-tuning, on three models: diversity only. Every token is clustered,
    compared by direction, weighed by the patches it holds, and what is merged stays as long as it was. They depend on
    ratios of distances alone, not on the scale of a model's features. examples/benchmarks/defaults.md has the table.
    """

    name = "bat"
    source = "arXiv 2211.11315"
    prop_attn = True
    presets = {
        "paper": {"clusters": 0.25, "pairs": 0.25, "neighbours": 5, "mass": 0.0, "density": "published",
                  "features": "tokens", "window": 256, "match_features": "tokens", "weights": "attention",
                  "keep_norm": False},
    }  # fmt: skip

    clusters: float = option(1.0, "share of the budget that goes to clusters of inattentive tokens", low=0.0, high=1.0)
    pairs: float = option(0.0, "share of the removed tokens that pairing attentive ones removes", low=0.0, high=1.0)
    inattentive: str = option("cluster", "what becomes of inattentive tokens", choices=("cluster", "drop"))
    neighbours: int = option(
        3, "nearest tokens that count for a density, the token itself among them", low=1, high=1_000
    )
    mass: float = option(0.125, "power of its size by which a token is denser", low=0.0, high=100.0)
    density: str = option(
        "scale_free", "how near tokens make a density; published depends on the scale of the features",
        choices=("scale_free", "published"), formerly="published",
    )  # fmt: skip
    balance: float = option(0.5, "what a scale-free density counts against separation", low=0.0, high=100.0)
    window: int = option(
        128, "about how many tokens are compared with each other; an image of more is clustered in equal windows", low=4
    )
    features: str = option("unit", "what clusters compare", choices=FEATURE_KINDS)
    match_features: str = option("unit", "what pairs compare", choices=FEATURE_KINDS)
    weights: str = option("size", "what a merged token is weighted by", choices=WEIGHT_KINDS)
    keep_norm: bool = option(True, "whether a merged token is as long as its members on average", formerly=False)

    def decide(self, stage_input: StageInput, budget: int) -> Decision:
        tokens = stage_input.tokens
        split = self.split(tokens.count, budget)
        attention = stage_input.attention.class_attention() if self.reads_attention() else None
        if attention is None or split.attentive == 0:
            alike = tokens.sizes is None and self.weights in ("size", "equal")
            weight = None if alike else raw_weights(self.weights, tokens.known_sizes(), attention)
            points, parts = self._points(stage_input), windows(tokens.count, split.clusters, self.window)
            return density_average(points, weight, tokens.sizes, split.clusters, self.rule, parts, self.keep_norm)
        if not self.merges():
            return Selection(highest(attention, split.attentive))
        sizes, (attentive, inattentive) = tokens.known_sizes(), by_attention(attention, split.attentive)
        place = self._paired(stage_input, attentive, split)
        if split.clusters:
            points, held = take(self._points(stage_input), inattentive), take(sizes, inattentive)
            parts = windows(tokens.count - split.attentive, split.clusters, self.window)
            behind = density_clusters(points, split.clusters, self.rule, held, parts)
            behind = behind + (split.attentive - split.pairs)
        else:
            behind = torch.full_like(inattentive, budget)
        group = put(torch.cat((place, behind), 1), torch.cat((attentive, inattentive), 1))
        merged = ordered_average(group, raw_weights(self.weights, sizes, attention), sizes, budget)
        return replace(merged, keep_norm=self.keep_norm)

    @property
    def rule(self) -> PeakRule:
        """Which tokens are centres."""
        balance = self.balance if self.density == "scale_free" else None
        return PeakRule(self.neighbours, self.mass, balance, cosine=self.features == "unit")

    def _points(self, stage_input: StageInput) -> Tensor:
        """What clusters compare; lengths are left to the comparison, which knows them from its products."""
        return stage_input.features("tokens" if self.features == "unit" else self.features)

    def _paired(self, stage_input: StageInput, attentive: Tensor, split: Split) -> Tensor:
        """Groups of the attentive tokens, `0..K-R-1`; the sides alternate by rank of class attention."""
        if not split.pairs:
            return numbers(attentive, split.attentive).expand_as(attentive)
        points = take(stage_input.features(self.match_features), attentive)
        gone, best = match_in_turn(points, 1, split.pairs)
        stays = torch.logical_not(gone)
        place = running(in_turn(stays, torch.ones_like(attentive[:, ::2], dtype=torch.bool), 1)) - 1
        away, left = place[:, 1::2], place[:, ::2]
        return in_turn(torch.where(gone, pick(left, best), away), left, 1)

    def split(self, tokens: int, budget: int) -> Split:
        """How a budget is spent."""
        return split_budget(tokens, budget, self.clusters if self.inattentive == "cluster" else None, self.pairs)

    def attentive(self, tokens: int, budget: int) -> int:
        return self.split(tokens, budget).attentive or budget  # without decoupling none are set apart

    def macs(self, shape: StageShape) -> int:
        split = self.split(shape.tokens, shape.budget)
        clustered = shape.tokens - split.attentive if split.clusters else 0
        sides = (split.attentive // 2) * (split.attentive - split.attentive // 2) if split.pairs else 0
        parts = windows(clustered, split.clusters, self.window) if clustered else 1
        pairs = window_pairs(clustered, parts) if clustered else 0
        return pairs * shape.feature_width(self.features) + sides * shape.feature_width(self.match_features)

    def reads_attention(self) -> bool:
        return self.clusters < 1 or self.inattentive == "drop" or self.weights in ("attention", "product")

    def merges(self) -> bool:
        return self.inattentive == "cluster" or self.pairs > 0
