"""Evaluation on several processes: every image counts once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from image_files import write_folder

from tokencut.data import image_set
from tokencut.data.sources import Subset, open_source
from tokencut.errors import DataError, UsageError
from tokencut.evaluation import accuracy
from tokencut.evaluation.distributed import _merged, evaluate_spread
from tokencut.models import digits
from tokencut.runtime.distributed import Group, process_group


def test_alone_there_is_nobody_to_tell() -> None:
    with process_group(torch.device("cpu")) as group:
        assert (group.rank, group.size, group.main) == (0, 1, True)
        assert (group.broadcast("a"), group.all_gather("b"), group.any(True), group.any(False)) == (
            "a",
            ["b"],
            True,
            False,
        )


class _Dealt(Group):
    """A process of several, whose others are run beside it."""


def test_a_spread_evaluation_counts_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged, source = digits.create(), Subset(open_source("digits"), range(31))
    whole = accuracy.evaluate(judged, source, workers=0, device="cpu")
    monkeypatch.setattr(_Dealt, "all_gather", lambda self, value: [value])
    parts = []
    for rank in range(3):
        group = _Dealt(rank, 3, torch.device("cpu"))
        parts.append(evaluate_spread(group, judged, source, workers=0))
    assert sorted(part.images for part in parts) == [10, 10, 11]
    merged = _merged(parts)
    assert (merged.images, merged.top1, merged.top5) == (31, whole.top1, whole.top5)
    assert merged.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (merged.correct, merged.numbers, merged.predicted) == (whole.correct, tuple(range(31)), whole.predicted)
    with pytest.raises(DataError, match="2 images in 'digits' are too few for 3 processes"):
        evaluate_spread(_Dealt(0, 3, torch.device("cpu")), judged, Subset(source, [0, 1]), workers=0)
    monkeypatch.setattr(_Dealt, "all_gather", lambda self, value: [parts[0], value])
    with pytest.raises(UsageError, match="`batch_size=0` is not a whole number from 1 to 65536"):
        evaluate_spread(_Dealt(0, 3, torch.device("cpu")), judged, source, workers=0, batch_size=0)


def test_images_stay_in_order_where_some_cannot_be_read_or_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "set", [str(number) for number in range(10)], images=21)
    (folder / "3" / "6.jpg").write_bytes(b"no image")
    judged = digits.create()
    whole = accuracy.evaluate(judged, folder, workers=0, device="cpu", limit=105)
    assert 0 < sum(whole.correct) < len(whole.correct) == 104
    monkeypatch.setattr(_Dealt, "all_gather", lambda self, value: [value])
    source, cpu = open_source(folder), torch.device("cpu")
    merged = _merged([evaluate_spread(_Dealt(rank, 4, cpu), judged, source, workers=0, limit=105) for rank in range(4)])
    assert (merged.correct, merged.numbers) == (whole.correct, whole.numbers)
    assert "numbers" not in merged.to_dict()


def test_one_per_cent_is_of_all_images_and_not_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.png" for number in range(3)]
    image_set.check_unreadable("images", names, 300, repr)
    with pytest.raises(DataError, match="at least 3 of 299 images in 'images' cannot be decoded"):
        image_set.check_unreadable("images", names, 299, repr)
    judged, source = digits.create(), Subset(open_source("digits"), range(30))
    asked: list[int | None] = []
    report = accuracy.evaluate(judged, source, workers=0, device="cpu")

    def evaluate(*args: object, of: int | None = None, **options: object) -> accuracy.EvaluationReport:
        asked.append(of)
        return dataclasses.replace(report, unreadable=("a.png",), numbers=(), correct=(), predicted=())

    monkeypatch.setattr("tokencut.evaluation.distributed.evaluate", evaluate)
    monkeypatch.setattr(_Dealt, "all_gather", lambda self, value: [value])
    with pytest.raises(DataError, match="at least 1 of 30 images in 'digits'"):
        evaluate_spread(_Dealt(0, 3, torch.device("cpu")), judged, source, workers=0)
    assert asked == [30]
