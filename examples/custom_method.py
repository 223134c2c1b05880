"""A reduction method of your own, outside the package: keep the tokens with the largest norm.

    python examples/custom_method.py

A method is a frozen dataclass. Its fields are its settings, `decide` looks at a stage's input and says what becomes of
the image tokens, and `macs` says what that costs. The decorator makes it known to `tokencut.compress` in this process.

For the command line, put the class into a package of your own, say into `my_package/norm_method.py`, and declare the
module in that package's `pyproject.toml`:

    [project.entry-points."tokencut.methods"]
    norm = "my_package.norm_method"

Once it is installed (`pip install .`), every command knows the method: `tokencut models --methods` lists it, and
`tokencut profile deit_tiny --method norm --method-option largest=false` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm

import tokencut
from tokencut.cost import total
from tokencut.methods import Method, Selection, StageInput, StageShape, ascending, option, ranking, register
from tokencut.model import predicted_macs


@register
@dataclass(frozen=True)
class LargestNorm(Method):
    """Tokens of large norm stay, the others are dropped."""

    name = "norm"
    source = "an example"
    prop_attn = False

    largest: bool = option(True, "keep the tokens of largest norm; the smallest where false")

    def decide(self, stage_input: StageInput, budget: int) -> Selection:
        # fp32 and a stable ranking: the same image then gives the same tokens, alone or in any batch.
        norms = stage_input.features("tokens").float().norm(dim=2)
        kept = ranking(norms if self.largest else -norms)[:, :budget]
        return Selection(ascending(kept))

    def macs(self, shape: StageShape) -> int:
        return 0  # norms are not counted, and there is no matrix product

    def reads_attention(self) -> bool:
        return False  # so that no class row is computed, nor counted

    def merges(self) -> bool:
        return False


def main() -> None:
    """Compresses DeiT-T by the method and prints what that does to tokens and cost."""
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    compressed = tokencut.compress(model, keep=0.7, method="norm")
    dense = tokencut.compress(model, keep=1.0, method="norm")
    for stage in compressed.recipe.stages:
        print(f"block {stage.block}: {stage.tokens_in} -> {stage.tokens_out} image tokens")
    cost, before = (total(predicted_macs(each)) / 1e9 for each in (compressed, dense))
    print(f"{cost:.3f} GMACs of {before:.3f}")


if __name__ == "__main__":
    main()
