"""The scripts on budgets per image and on scores from stage to stage: their rules by hand, and that they run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import budget_images
import budget_levels
import budget_signals
import numpy as np
import pytest
import scores
import torch
from PIL import Image

PLAIN = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))


def test_levels_by_known_losses() -> None:
    loss = np.stack([np.where(np.arange(64) < 32, 0.0, 1.0), np.zeros(64)])
    assert budget_levels.knowing(loss, np.array([1.0, 3.0]), 2.0).tolist() == [0] * 32 + [1] * 32


def test_one_rate_between_two_that_were_measured() -> None:
    values = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert budget_levels.at_cost(values, np.array([1.0, 2.0, 4.0]), 3.0).tolist() == [1.0, 0.5]


def test_surroundings_follow_from_the_image() -> None:
    def placed(kind: str) -> Image.Image:
        others = [PLAIN.rotate(90), Image.new("RGB", (16, 16), (255, 0, 0))]
        return budget_images.InSurroundings(kind, None, others).placed(PLAIN)  # type: ignore[arg-type]

    assert placed("whole") is PLAIN
    assert placed("blurred").size == (16, 16) != placed("blank").size == (32, 32)
    blank, crowded = (np.asarray(placed(kind)) for kind in ("blank", "crowded"))
    shown = np.any(blank != budget_images.GREY, 2)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    place = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    assert np.array_equal(blank[place], np.asarray(PLAIN)) and np.array_equal(crowded[place], np.asarray(PLAIN))
    assert np.array_equal(crowded, np.asarray(placed("crowded")))
    assert (crowded == (255, 0, 0)).all(2).any() and not (crowded[~shown] == budget_images.GREY).all(1).any()


def test_signals_of_distances_by_hand() -> None:
    features = torch.tensor([[[2.0, 0.0], [5.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    found = budget_signals.of_distances(budget_signals.between(features))
    # Distances: 0 between the first two, 1 from the third to all, 2 from the last to the first two; 7 / 6 on average.
    assert found["near"].item() == pytest.approx(0.5) and found["nearest"].item() == pytest.approx(0.5 * 6 / 7)
    assert found["copies"].item() == 0.5
    centred = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]) - torch.tensor([0.25, 0.25])
    products = centred @ centred.T
    assert found["spread"].item() == pytest.approx((products.trace() ** 2 / products.square().sum()).item())


def test_signals_of_attention_by_hand() -> None:
    found = budget_signals.of_attention(torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.5, 0.0, 0.5, 0.0]]))
    torch.testing.assert_close(found["entropy"], torch.tensor([1.0, math.log(2) / math.log(4)]))
    torch.testing.assert_close(found["top"], torch.tensor([0.25, 0.5]))


def test_agreement_of_scores_by_hand() -> None:
    rising = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for other, expected in ((rising * 7, [1, 1]), (-rising, [-1, 0]), (torch.tensor([[2.0, 1.0, 4.0, 3.0]]), [0.6, 1])):
        torch.testing.assert_close(scores.agreement(rising, other).flatten().tolist(), [*map(float, expected)])


@pytest.mark.slow
def test_the_scripts_on_the_digits(benchmark: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    held = tmp_path / "held.npz"
    words = f"digits --calibration digits --data digits --images 64 --limit 24 --held {held} --device cpu --workers 0"
    words += " --rates 0.4 0.7 1 --keep 0.7 --batch-size 12"
    printed, _ = benchmark("budgets", *words.split())
    assert printed.startswith("digits, bat, 24 images of digits, calibrated on 64 of digits, fp32, on ")
    told, *budgets = printed.split("\n## ")
    assert [line.split(" | ")[0] for line in told.splitlines()[4:]] == ["| 0.4", "| 0.7", "| 1"]
    assert [each.splitlines()[0] for each in budgets] == [
        "whole: the mean cost of keep 0.7", "whole, blurred, blank, crowded: the mean cost of keep 0.7"
    ]  # fmt: skip
    for table in budgets:
        assert "| tokens: nearest |" in table and "| *told its answer* |" in table
    again, _ = benchmark("budgets", "--held", str(held), "--keep", "0.7")
    assert again == printed
    words = "digits --data digits --limit 8 --blocks 2 4 --device cpu"
    printed, _ = benchmark("scores", *words.split())
    assert printed.count("| class attention | blocks 2 and 4 |") == 1 and "two images" in printed
