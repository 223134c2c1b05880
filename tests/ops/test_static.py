"""Which tubelets are static, and which of them stands for those that go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokencut.ops.static import changes, without_static


def clip() -> Tensor:
    """4 tubelets of 2 frames, 1 x 2 places of 2 x 2 px: the left place changes by 3, 0 and 1, the right by 0, 5, 0."""
    levels = torch.tensor([[0.0, 7.0], [3.0, 7.0], [3.0, 2.0], [4.0, 2.0]])
    frames = levels.repeat_interleave(2, 0).repeat_interleave(2, 1)  # (8, 4)
    return frames[None, None, :, None, :].expand(1, 3, 8, 2, 4).clone()


def test_changes_are_mean_absolute_differences() -> None:
    found = changes(clip(), (2, 2, 2)).view(4, 2)
    assert found[1:].tolist() == [[3, 0], [0, 5], [1, 0]]
    assert (found[0] > found[1:].max()).all()
    mixed = clip()
    mixed[:, 0, 3, 0, 0] += 24  # one of the 2 x 2 x 2 x 3 numbers of the second tubelet
    assert changes(mixed, (2, 2, 2)).view(4, 2)[1:, 0].tolist() == [4, 1, 1]
    wider = torch.cat((clip(), torch.rand(1, 3, 8, 2, 1)), 4)  # a column of pixels that fills no tubelet
    assert torch.equal(changes(wider, (2, 2, 2)).view(4, 2), found)


@pytest.mark.parametrize(
    ("count", "group"),
    [
        (2, [0, 1, 0, 1, 0, 1, 0, 1]),  # the first frame alone
        (4, [0, 1, 2, 1, 2, 3, 2, 3]),  # and the changes of 3 and 5
        (5, [0, 1, 2, 1, 2, 3, 4, 3]),
        (6, [0, 1, 2, 3, 2, 4, 5, 4]),  # of equal changes the earlier
        (8, list(range(8))),
    ],
)
def test_what_goes_goes_into_the_last_that_stays(count: int, group: list[int]) -> None:
    decision = without_static(changes(clip(), (2, 2, 2)), 2, count)
    assert (decision.group.tolist(), decision.count) == ([group], count)
    # What stays is what it was, whatever goes into it.
    first = [group.index(number) for number in range(count)]
    assert decision.weight[0].nonzero().flatten().tolist() == first
    assert decision.weight.sum() == count


def test_each_clip_for_itself() -> None:
    torch.manual_seed(0)
    clips = torch.rand(3, 3, 8, 4, 6)
    changed = changes(clips, (2, 2, 2))
    together = without_static(changed, 6, 11).group
    assert torch.equal(together, torch.cat([without_static(one, 6, 11).group for one in changed.split(1)]))
