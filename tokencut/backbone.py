"""Compressed models as backbones of segmentation and detection heads: what timm's `features_only=True` gives."""

from __future__ import annotations

import copy
from typing import Any

from timm.models import get_model_traits
from timm.models._features import FeatureGetterNet
from torch import nn

from tokencut.features import Form, Indices, block_indices
from tokencut.model import require_compressed, require_one_schedule
from tokencut.unmerging import Unmerging


def features_only(
    model: nn.Module,
    *,
    out_indices: Indices = 3,
    norm: bool = False,
    output_fmt: str = "NCHW",
    prune: bool = True,
    unmerge: str | None = None,
) -> FeatureGetterNet:
    """Makes a backbone that gives a list of feature maps, in place of `timm.create_model(..., features_only=True)`.

    Tokens are un-merged to the full grid, as `CompressedModel.forward_intermediates` says.

    Args:
        model: What `compress` or `load` returned; it is copied and stays as it was.
        out_indices: So many last blocks, or 0-based blocks (negative ones from the end), or None for all; 3
            as for timm's own.
        norm: Whether the model's final norm applies to each map.
        output_fmt: `"NCHW"` for `(B, D, rows, columns)`, `"NLC"` for `(B, patches, D)`.
        prune: Whether to remove blocks, norm and head that the maps do not need.
        unmerge: How patches get their features, `"change"` or `"copy"`; the model's attribute `unmerge` where None.

    Returns:
        timm's own module for features, with its `feature_info` (`channels()`, `reduction()`, `module_name()`).

    Raises:
        UsageError: The model is not a compressed one, or a block, a format or a rule does not exist.

    Example:
        >>> import timm, torch, tokencut
        >>> model = tokencut.compress(timm.create_model("test_vit"), keep=0.5, layers=[2, 4])
        >>> backbone = tokencut.features_only(model, out_indices=(1, 3, 5))
        >>> backbone.feature_info.channels()
        [64, 64, 64]
        >>> [tuple(features.shape) for features in backbone(torch.zeros(2, 3, 160, 160))]
        [(2, 64, 10, 10), (2, 64, 10, 10), (2, 64, 10, 10)]
    """
    model = require_compressed(model, "features_only")
    require_one_schedule(model, "features_only")
    Form(output_fmt=output_fmt)
    rule = model.unmerge if unmerge is None else unmerge
    Unmerging(rule)
    blocks = block_indices(model.adapter.feature_maps(model.model), out_indices)
    indices = out_indices if isinstance(out_indices, int) else tuple(blocks)
    whole = copy.deepcopy(model)
    whole.unmerge = rule  # timm's module passes its own arguments only
    backbone: Any = FeatureGetterNet(whole, indices, norm=norm, output_fmt=output_fmt, prune=prune)
    # What timm's builder notes on its own: how to preprocess, less what describes a classifier.
    left_out = ("num_classes", "classifier", "global_pool")
    backbone.pretrained_cfg = {name: value for name, value in model.pretrained_cfg.items() if name not in left_out}
    backbone.default_cfg = backbone.pretrained_cfg
    backbone._traits = {name: value for name, value in get_model_traits(model.model).items() if name not in left_out}
    backbone.in_chans = backbone._traits.get("in_chans")
    backbone.train(model.training)
    return backbone
