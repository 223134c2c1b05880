"""What makes a timm model compute what weights from elsewhere were trained with, where timm has no argument for it.

torch is imported where a model is changed: what is said of a change can be read without.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokencut.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

CLASS_AND_MEAN = "class+mean"
POOLS = (CLASS_AND_MEAN,)

# Where an altered model keeps its alterations: a copy of it has them too.
_ALTERED = "_tokencut_alterations"


@dataclass(frozen=True)
class Alterations:
    """What is changed after `timm.create_model`.

    Attributes:
        norm_eps: What every layer norm adds to a variance; timm's own where None.
        pool: `class+mean` for a classifier that reads the class token beside the mean of the image tokens.
    """

    norm_eps: float | None = None
    pool: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Those that change something."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def alterations_of(model: nn.Module) -> Alterations:
    """What `alter` changed in a model."""
    found = getattr(model, _ALTERED, None)
    return found if isinstance(found, Alterations) else Alterations()


def alter(model: Any, alterations: Alterations) -> None:
    """Changes a model that timm has just built, in place; an epsilon that it has already is no change.

    Args:
        model: timm's.
        alterations: What to change.

    Raises:
        ModelError: The model has no such part.
    """
    from torch import nn

    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
    eps = alterations.norm_eps if any(norm.eps != alterations.norm_eps for norm in norms) else None
    if eps is not None:
        for norm in norms:
            norm.eps = eps
    if alterations.pool is not None:
        _widen_head(model)
    setattr(model, _ALTERED, Alterations(eps, alterations.pool))


def _widen_head(model: Any) -> None:
    from torch import nn

    from tokencut.adapters.pooling import ClassAndMean

    head, classes = getattr(model, "head", None), int(getattr(model, "num_classes", 0) or 0)
    fits = hasattr(model, "attn_pool") and getattr(model, "global_pool", None) == "token"
    if not fits or not isinstance(head, nn.Linear if classes else nn.Identity):
        raise ModelError(f"{type(model).__name__} has no head that could read the class token beside the mean of the "
                         "image tokens; use a Vision Transformer with a class token")  # fmt: skip
    model.attn_pool, model.pool_include_prefix = ClassAndMean(int(model.num_prefix_tokens)), True
    model.head_hidden_size = 2 * model.embed_dim
    if isinstance(head, nn.Linear):
        model.head = nn.Linear(2 * model.embed_dim, classes, device=head.weight.device, dtype=head.weight.dtype)
        nn.init.trunc_normal_(model.head.weight, std=0.02)
        nn.init.zeros_(model.head.bias)
