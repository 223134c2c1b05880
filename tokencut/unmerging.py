"""Un-merging: from the tokens that are left back to one feature for every patch of the image, by the source map."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencut.errors import UsageError
from tokencut.tokens import Tokens


def unmerge(tokens: Tokens, last: Tensor | None = None) -> Tensor:
    """Gives every patch the features of the token that it went into.

    Shapes do not depend on the data, and the result has a gradient.

    Args:
        tokens: Tokens with a source map, `N` image tokens.
        last: What the patches become that were dropped, `(B, patches, D)`: the last features they had, if it is the
            un-merged tokens that entered the stage where they were. Zeros where None.

    Returns:
        `(B, patches, D)`, without prefix tokens, in the order of the patches.

    Raises:
        UsageError: The tokens have no source map.
    """
    if tokens.source is None:
        raise UsageError("the tokens have no source map to go back by; type model.trace(images, source=True)")
    image, place = tokens.image, tokens.source.unsqueeze(2)
    features = image.gather(1, place.clamp(min=0).expand(-1, -1, image.shape[2]))
    fallback = image.new_zeros(()) if last is None else last.to(image.dtype)
    return torch.where(place >= 0, features, fallback)
