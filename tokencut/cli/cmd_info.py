"""`tokencut info`: what a tokencut file says about its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokencut.cli import render
from tokencut.cli.options import JsonFlag
from tokencut.messages import listed

if TYPE_CHECKING:
    from tokencut.models.metadata import ArtifactInfo


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that tokencut compress wrote.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Prints what a tokencut file holds, without building its model.

    Example:
      tokencut info out.safetensors
    """
    from tokencut.models.finite import not_finite_in
    from tokencut.models.header import read_header

    found = read_header(file)
    size, wrong = file.stat().st_size, not_finite_in(file)
    if wrong:
        render.note(f"the weights cannot be used: {len(wrong)} with numbers that are not finite: {listed(wrong)}; "
                    "compress a model with other weights")  # fmt: skip
    if as_json:
        tensors = {"dtype": found.dtype, "parameters": found.parameters, "bytes": size, "not_finite": wrong}
        render.write_json({"file": str(file), **json.loads(found.to_text()), "tensors": tensors})
        return
    render.show(render.facts(_facts(found, size)))
    rows = [(str(stage.block), str(stage.tokens_in), str(stage.tokens_out)) for stage in found.recipe.stages]
    if rows and found.recipe.levels is None:
        render.show(render.table(("block", "tokens in", "tokens out"), rows))


def _facts(found: ArtifactInfo, size: int) -> list[tuple[str, str]]:
    recipe, levels = found.recipe, found.recipe.levels
    rows = [
        ("architecture", found.architecture),
        ("arguments", render.pairs(found.model_args)),
        *([("not timm's own", render.pairs(altered))] if (altered := found.alterations.to_json()) else []),
        ("method", " ".join((recipe.method, render.pairs(recipe.method_options)))),
        (
            "keep",
            render.keep_text(recipe.keep, recipe.schedule.reduce_by)
            if levels is None
            else ", ".join(
                f"{keep:g} for {share:.0%} of the images"
                for keep, share in zip(levels.keeps, levels.shares, strict=True)
            ),
        ),
        ("layers", ",".join(map(str, recipe.layers))),
        *([] if recipe.static_keep is None else [("static keep", f"{recipe.static_keep:g}")]),
        ("proportional attention", "on" if recipe.prop_attn else "off"),
        ("preprocessing", render.pairs(found.preprocessing)),
        ("labels", _labels(found)),
        ("weights from", str(found.origin)),
        ("licence", found.origin.licence or "not known"),
        ("measured", render.pairs(found.measured) or "nothing yet: add --data DIR to tokencut compress"),
        ("tensors", f"{found.parameters:,} numbers in {found.dtype}, {size / 1e6:.1f} MB"),
    ]
    return [(name, value or "none") for name, value in rows]


def _labels(found: ArtifactInfo) -> str:
    names = found.label_names
    if not names:
        return "not known"
    return listed(tuple(names.values() if isinstance(names, Mapping) else names))
