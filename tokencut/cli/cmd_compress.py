"""`tokencut compress`: makes a model cheaper, and writes it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokencut.cli import render
from tokencut.cli.options import (
    PRECISION,
    DataOptions,
    JsonFlag,
    ModelArgument,
    ModelOptions,
    Precision,
    ReductionOptions,
    RunOptions,
    with_groups,
)


@with_groups
def compress(
    model: ModelArgument,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write, *.safetensors.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    dtype: Annotated[Precision, typer.Option("--dtype", **PRECISION, help="How to store the weights.")] = "fp32",
    reduction: ReductionOptions,
    source: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    as_json: JsonFlag = False,
) -> None:
    """Compresses a model by reducing its tokens, and writes it to a file.

    With --data the accuracy before and after is measured and stored too.

    Examples:
      tokencut compress deit_tiny --keep 0.6 -o out.safetensors
      tokencut compress digits --keep 0.5 --data digits -o digits.safetensors
      tokencut compress vit_small_patch16_224 --checkpoint weights.pth \\
          --num-classes 10 --keep 0.9/0.7/0.5 -o out.safetensors
    """
    from tokencut.artifact import check_output, save
    from tokencut.cli.subject import gmacs, measure_accuracy, prepare
    from tokencut.compression import CompressedModel
    from tokencut.runtime import resolve_device
    from tokencut.sources import open_source

    check_output(output, force=force)
    device = resolve_device(run.device)
    images = None if data.data is None else open_source(data.data, on_note=render.note)
    subject = prepare(model, source, reduction, seed=run.seed)
    assert isinstance(subject.model, CompressedModel)
    measured: dict[str, Any] = {"dense_gmacs": gmacs(subject.dense), "gmacs": gmacs(subject.model)}
    if images is not None:
        before = measure_accuracy(subject.dense, f"dense {subject.name}", images, data, run, device)
        after = measure_accuracy(subject.model, f"compressed {subject.name}", images, data, run, device)
        for text in after.notes:
            render.note(text)
        measured |= {"dense_top1": before.top1, "top1": after.top1, "dense_top5": before.top5, "top5": after.top5}
        measured["images"] = after.images
    save(subject.model, output, force=force, dtype=dtype, measured=measured)
    recipe = subject.model.recipe
    made = {"output": str(output), "model": subject.name, "method": recipe.method, "keep": recipe.keep}
    if as_json:
        render.write_json({**made, "layers": recipe.layers, **measured})
        return
    render.show(render.facts(_facts(str(output), subject.name, subject.describe(), measured)))
    render.note(f"next: tokencut profile {output}, or tokencut eval {output} --data DIR")


def _facts(output: str, model: str, reduction: str, measured: dict[str, Any]) -> list[tuple[str, str]]:
    before, after = measured["dense_gmacs"], measured["gmacs"]
    saved = render.change_text(before, after) or "nothing saved"
    rows = [
        ("wrote", output),
        ("model", model),
        ("reduction", reduction),
        ("GMACs per image", f"{render.gmacs_text(before)} -> {render.gmacs_text(after)} ({saved})"),
    ]
    if "top1" in measured:
        drop = measured["top1"] - measured["dense_top1"]
        change = f"{measured['dense_top1']:.2f} % -> {measured['top1']:.2f} % ({drop:+.2f} points)"
        rows.append(("top-1", f"{change} on {measured['images']:,} images"))
    return rows
