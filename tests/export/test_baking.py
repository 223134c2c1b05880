"""What is resampled weights is a tensor of the program, and the rest is computed as before."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokencut.export.baking import bake_resampling, bake_sizes
from tokencut.export.graph import drop_checks


class Resampled(nn.Module):
    """A table of positions, resampled, with a part of it that is not; and images that are resampled as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
        self.first = nn.Parameter(torch.full((1, 3, 1), 7.0))

    def forward(self, images: Tensor) -> Tensor:
        table = F.interpolate(self.table, size=(4, 4), mode="bicubic", antialias=True)
        table = torch.cat((self.first, table.flatten(2)), dim=2)
        images = F.interpolate(images, size=(4, 4), mode="nearest").flatten(2)
        return torch.cat((images, self.first.expand(images.shape[0], -1, -1)), dim=2) + table


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_resampled_weights_become_a_tensor() -> None:
    module, images = Resampled(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(module, (images[:2],), dynamic_shapes=shapes)
    before = targets(program)
    bake_resampling(program)
    assert "aten._upsample_bicubic2d_aa.vec" in before and "aten._upsample_bicubic2d_aa.vec" not in targets(program)
    assert "aten.upsample_nearest2d.vec" in targets(program)  # of the images, which are no weights
    assert list(program.constants) == ["baked_resampled_0"]
    expected = module(images)
    assert torch.equal(program.module()(images), expected)
    buffer = io.BytesIO()
    torch.export.save(program.run_decompositions({}), buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(images), expected)


def test_a_program_without_any_stays_as_it_is() -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.zeros(2, 3),))
    code = program.graph_module.code
    bake_resampling(program)
    assert program.graph_module.code == code
    assert not program.constants


class Numbered(nn.Module):
    """What follows from sizes alone, of tokens and of images."""

    def forward(self, values: Tensor) -> Tensor:
        numbers = torch.arange(4, dtype=torch.int32)
        later = (numbers.unsqueeze(0) > numbers.unsqueeze(1)).to(torch.float32)
        return values.unsqueeze(1) * later + torch.full((values.shape[0], 1, 4), 2.0) + numbers


def test_what_follows_from_sizes_of_tokens_becomes_a_tensor() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    shapes = {"values": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Numbered(), (values,), dynamic_shapes=shapes)
    drop_checks(program)
    program = program.run_decompositions()
    bake_sizes(program)
    assert [tuple(value.shape) for value in program.constants.values()] == [(4,), (4, 4)]
    assert not {"aten.arange.start_step", "aten.gt.Tensor"} & set(targets(program))
    assert "aten.full.default" in targets(program)  # of as many images as there will be
    for images in (1, 3):
        assert torch.equal(program.module()(values[:images]), Numbered()(values[:images]))
