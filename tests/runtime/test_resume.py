"""Whether a run may go on: other conditions are refused by name, and weights are known by a digest."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tokencut.errors import ArtifactError
from tokencut.runtime.resume import require_same, weights_digest


def test_what_is_the_same_goes_on_whatever_else_was_there() -> None:
    require_same("f holds a run", {"seed": "0", "more": "1"}, {"seed": "0"}, "start again")


def test_all_that_differs_is_named_and_short_values_told() -> None:
    made = {"seed": "0", "weights": "a" * 64, "device": "cpu"}
    with pytest.raises(ArtifactError) as caught:
        require_same("f holds a run", made, {"seed": "1", "weights": "b" * 64, "device": "cpu", "new": "x"}, "go away")
    assert str(caught.value) == (
        "f holds a run made with other seed (0, not 1) and other weights and other new (nothing, not x); go away"
    )


def test_the_digest_tells_weights_apart() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    digest = weights_digest(first)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert weights_digest(second) != digest
    second.load_state_dict(first.state_dict())
    assert weights_digest(second) == digest
    assert weights_digest(second, "two heads") != digest
    assert weights_digest(first.to(torch.bfloat16)) != digest


def test_the_digest_knows_buffers_names_and_shapes() -> None:
    class Held(nn.Module):
        def __init__(self, name: str, value: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer(name, value)

    zeros = torch.zeros(4)
    held = [Held("a", zeros), Held("b", zeros), Held("a", zeros.view(2, 2)), Held("a", zeros + 1)]
    assert len(set(map(weights_digest, held))) == 4
