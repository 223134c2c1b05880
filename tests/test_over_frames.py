"""A model of images on clips: the mean of what it says of their frames."""

from __future__ import annotations

import pytest
import timm
import torch
from video_files import tiny_videomae

import tokencut
from tokencut.errors import UsageError
from tokencut.over_frames import OverFrames, of_images


def test_logits_are_the_mean_over_frames() -> None:
    torch.manual_seed(0)
    model = tokencut.compress(timm.create_model("test_vit", img_size=64, num_classes=3), keep=0.5, layers=[2]).eval()
    over, clips = OverFrames(model, 4).eval(), torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        frames = torch.stack([model(clips[:, :, number]) for number in range(4)])
        torch.testing.assert_close(over(clips), frames.mean(0))
    assert over.num_classes == 3 and over.pretrained_cfg["frames"] == 4 and of_images(over) is model


@pytest.mark.slow
def test_costs_are_those_of_all_frames() -> None:
    model = tokencut.compress(timm.create_model("test_vit", img_size=64), keep=0.5, layers=[2])
    report, over = (tokencut.profile(each, latency=False) for each in (model, OverFrames(model, 3)))
    assert over.dense.gmacs == pytest.approx(3 * report.dense.gmacs)
    assert over.compressed.gmacs == pytest.approx(3 * report.compressed.gmacs)
    assert (over.keep, over.stages, over.notes) == (report.keep, report.stages, ())


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="takes clips of 4 frames by itself"):
        OverFrames(tokencut.compress(tiny_videomae(), keep=0.5, layers=[1]), 8)
    with pytest.raises(UsageError, match="`frames=0` is not a whole number from 1"):
        OverFrames(timm.create_model("test_vit"), 0)
