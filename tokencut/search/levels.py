"""Finds a keep rate for each image: levels by how varied an image is, at a mean cost. No training."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencut.adapters import plain_model
from tokencut.data.sources import Source, open_source
from tokencut.errors import UsageError
from tokencut.limits import check_number
from tokencut.model import CompressedModel, compress, predicted_gmacs
from tokencut.models.checkpoints import require_finite
from tokencut.models.pretrained_cfg import require_head
from tokencut.observers import Observer
from tokencut.ops.spread import SPREAD_MACS, spread
from tokencut.recipe import Levels
from tokencut.runtime.devices import inference_state, precision_dtype, resolve_device
from tokencut.schedule import Layers
from tokencut.search.calibration import calibration_images
from tokencut.search.report import SearchSettings
from tokencut.search.sorting import Floats, Rule, calibrated

# What a level may keep.
RATES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
# A limit chosen by fewer images would be one of chance.
FEWEST_IMAGES = 32


@dataclass(frozen=True)
class LevelsReport:
    """What was found.

    Attributes:
        levels: For `compress(model, levels=report.levels, ...)`.
        gmacs: Mean multiply-adds of an image, in units of 1e9, by the calibration images.
        dense_gmacs: Those of the dense model.
        divergence: Mean KL divergence from the dense model on these images, in nats.
        one_rate: The highest rate that costs no more for all of them.
        one_rate_divergence: What it diverges by.
        images: How many images there were.
        seconds: What it took.
        notes: What a user should know.
    """

    levels: Levels
    gmacs: float
    dense_gmacs: float
    divergence: float
    one_rate: float
    one_rate_divergence: float
    images: int
    seconds: float
    notes: tuple[str, ...] = ()


def find_levels(
    model: nn.Module,
    calibration: str | os.PathLike[str] | Source,
    gmacs: float,
    *,
    most: int = 4,
    layers: Layers | None = None,
    method: str | None = None,
    prop_attn: bool | None = None,
    method_options: Mapping[str, Any] | None = None,
    settings: SearchSettings | None = None,
    observer: Observer | None = None,
) -> LevelsReport:
    """Sorts images into levels, each with a keep rate, that diverge least from the dense model at a mean cost.

    Images that are spread wide keep more of their tokens, or fewer, whichever is better. All levels of one rate are
    among the choices. The mean holds for images like those of `calibration`: more varied ones cost more.

    Args:
        model: A timm classifier of a supported family, with its weights; it stays as it was.
        calibration: Images as `open_source` takes them: never those that accuracy is told of.
        gmacs: The mean multiply-adds of an image, in units of 1e9.
        most: How many levels there may be.
        layers: As `compress` takes them; so are `method`, `prop_attn` and `method_options`.
        method: Likewise.
        prop_attn: Likewise.
        method_options: Likewise.
        settings: How it runs; effort and timing do not count.
        observer: Told how far it is, and asked whether to stop.

    Raises:
        UsageError: An argument is out of range, or no rate costs so little.
        TokencutError: The images cannot be read, or there is no classifier.
        KeyboardInterrupt: It was told to stop.

    Example:
        >>> import tokencut
        >>> from tokencut.models.loading import load_model
        >>> digits = load_model("digits").model
        >>> dense = tokencut.profile(digits, latency=False).dense.gmacs
        >>> settings = tokencut.SearchSettings(images=64, workers=0, device="cpu")
        >>> report = tokencut.find_levels(digits, "digits", 0.7 * dense, settings=settings)
        >>> model = tokencut.compress(digits, levels=report.levels)
        >>> report.gmacs <= 0.71 * dense, len(report.levels.keeps) <= 4
        (True, True)
    """
    chosen, started, told = settings or SearchSettings(), time.perf_counter(), observer or Observer()
    check_number("gmacs", gmacs)
    check_number("levels", most)
    model = plain_model(model)
    require_head(model)
    require_finite(model)
    base = compress(model, keep=RATES[-1], layers=layers, method=method, prop_attn=prop_attn,
                    method_options=method_options)  # fmt: skip
    every = {predicted_gmacs(one): (rate, one) for rate in reversed(RATES) for one in [base.at(rate)]}
    costs = np.array(sorted(every))
    least = costs[0] + SPREAD_MACS / 1e9
    if gmacs < least:
        raise UsageError(f"keep {RATES[0]} for every image takes {least:.4g} GMACs, and {gmacs:g} are to be the "
                         "mean; give more, or `layers` that stand earlier")  # fmt: skip
    source = open_source(calibration, split="train", observer=observer)
    device = resolve_device(chosen.device)
    with inference_state(base, device, precision_dtype(chosen.precision)), torch.no_grad():
        images = calibration_images(base, source, limit=chosen.images, batch_size=chosen.batch_size, device=device,
                                    seed=chosen.seed, workers=chosen.workers, observer=observer)  # fmt: skip
        signal = torch.cat([spread(batch) for batch in images.batches]).double().cpu().numpy()
        if len(signal) < FEWEST_IMAGES:
            raise UsageError(f"{len(signal)} images tell no levels apart, expected at least {FEWEST_IMAGES}; give more "
                             "as `calibration`")  # fmt: skip
        loss = divergences(base, [every[cost][1] for cost in costs], images.batches, told)
    budget = gmacs - SPREAD_MACS / 1e9
    rule = calibrated(signal, loss, costs, budget, most)
    rates = [every[cost][0] for cost in costs]
    fixed = int(np.flatnonzero(costs <= gmacs)[-1])
    levels = levels_of(rule, rates, signal)
    return LevelsReport(
        levels=levels,
        gmacs=float(costs[rule(signal)].mean()) + SPREAD_MACS / 1e9,
        dense_gmacs=predicted_gmacs(model),
        divergence=rule.loss,
        one_rate=rates[fixed],
        one_rate_divergence=float(loss[fixed].mean()),
        images=len(signal),
        seconds=time.perf_counter() - started,
        notes=images.notes,
    )


def divergences(
    base: CompressedModel, models: Sequence[CompressedModel], batches: Sequence[Tensor], observer: Observer
) -> Floats:
    """What each image loses in some models around the same weights: KL from the dense one, `(models, images)`."""
    found: list[Tensor] = []
    for done, batch in enumerate(batches):
        observer.progress("trying keep rates", done, len(batches), {})
        if observer.should_stop():
            raise KeyboardInterrupt
        dense = base.model(batch).float().log_softmax(1)
        outputs = torch.stack([one(batch) for one in models]).float().log_softmax(2)
        apart = F.kl_div(outputs, dense.expand_as(outputs), reduction="none", log_target=True)
        found.append(apart.sum(2).clamp(min=0).cpu())
    return torch.cat(found, 1).double().numpy()


def levels_of(rule: Rule, rates: Sequence[float], signal: Floats) -> Levels:
    """A rule as a recipe holds it: neighbouring bins of one level in one."""
    levels = rule.levels.tolist()
    starts = [0, *(at for at in range(1, len(levels)) if levels[at] != levels[at - 1])]
    found = rule(signal)
    shares = [float(np.mean(found == levels[at])) for at in starts]
    return Levels(tuple(rates[levels[at]] for at in starts), tuple(float(rule.limits[at - 1]) for at in starts[1:]),
                  tuple(shares))  # fmt: skip
