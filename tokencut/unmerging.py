"""Un-merging: features on the full grid of patches again, by the source map."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencut.errors import UsageError
from tokencut.ops.ranking import take_rows
from tokencut.tokens import Tokens, full_precision

# What a patch is given back: its own features with what its token changed by, or its token's features.
UNMERGE_RULES = ("change", "copy")


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
    # Behind the tokens a row of zeros, for what was dropped.
    image, dropped = F.pad(tokens.image, (0, 0, 0, 1)), tokens.source < 0
    features = take_rows(image, torch.where(dropped, tokens.count, tokens.source))
    return features if last is None else torch.where(dropped.unsqueeze(2), last.to(image.dtype), features)


class Unmerging:
    """Un-merges tokens through all the stages of a run, one after the other.

    By `change`, patch `i` of token `j` gets `y_i = x_i + (z_j - s_j)`: the features `x_i` that it had where it entered
    the last stage, and what its token has changed by since, from `s_j` right behind it to `z_j`. From the second stage
    on, `x_i` is itself un-merged by this rule. A patch alone in its token gets its token's features, to the bit.

    Tokens that were dropped have no `j`, and a token that fuses unlike ones is like none of them. Where there are such
    (`similar`), the token left that is most similar at the stage takes its place, for all stages to come.

    By `copy`, every patch gets `z_j`; one that was dropped keeps its last features, those with which it entered the
    stage that dropped it.

    From the first stage on this holds one number for each feature of each patch, `(B, patches, D)`. Which rule is how
    near to the dense model: examples/benchmarks/unmerging.md.
    """

    def __init__(self, rule: str, similar: bool = False) -> None:
        """Starts where every token is a patch.

        Args:
            rule: `change` or `copy`.
            similar: Whether stages drop tokens or fuse unlike ones (not `Method.averages`).

        Raises:
            UsageError: There is no such rule.
        """
        if rule not in UNMERGE_RULES:
            raise UsageError(f"unmerge {rule!r} is not known; give {' or '.join(map(repr, UNMERGE_RULES))}")
        self._rule = rule
        self._similar = similar
        self._own: Tensor | None = None  # what is a patch's own and not its token's
        self._followed: Tensor | None = None  # by `change`: the token whose changes are a patch's, as a source map

    def stage(self, entering: Tokens, leaving: Tokens) -> None:
        """Takes note of what a stage does to each patch.

        Args:
            entering: The tokens before the stage, with their source map.
            leaving: The tokens behind it.
        """
        patches, before = self.patches(entering), self._followed
        self._own = patches
        if self._rule == "change":
            self._followed = leaving.source
            if self._similar:
                before = entering.source if before is None else before
                assert before is not None
                self._followed = successors(entering, leaving).gather(1, before)
            # z + (x - s) is x + (z - s), but holds one map instead of two, and is z to the bit for a patch alone.
            self._own = patches - unmerge(replace(leaving, source=self._followed))

    def patches(self, tokens: Tokens) -> Tensor:
        """One feature for every patch, `(B, patches, D)`; the tokens themselves before the first stage."""
        if self._own is None:
            return tokens.image
        if self._rule == "copy":
            return unmerge(tokens, self._own)
        return unmerge(replace(tokens, source=self._followed)) + self._own.to(tokens.features.dtype)

    def full(self, tokens: Tokens) -> Tensor:
        """Prefix tokens, untouched, and all patches: `(B, P + patches, D)`."""
        if self._own is None:
            return tokens.features
        return torch.cat((tokens.features[:, : tokens.num_prefix_tokens], self.patches(tokens)), 1)


@torch.no_grad()
def successors(entering: Tokens, leaving: Tokens) -> Tensor:
    """Which token behind a stage stands for each token before it.

    Args:
        entering: The tokens before the stage, `N` image tokens with their source map.
        leaving: The tokens behind it.

    Returns:
        int64 `(B, N)`: what a token became that stayed as it was; the most similar one (Euclidean distance, the first
        of equals) for one that was dropped, or fused into one with others.
    """
    assert entering.source is not None and leaving.source is not None
    count, left = entering.count, leaving.count
    # Every token holds a patch, which tells where it went; patches dropped before write past the end.
    slot = torch.where(entering.source >= 0, entering.source, count)
    became = slot.new_full((slot.shape[0], count + 1), -1).scatter(1, slot, leaving.source)[:, :count]
    stays = became >= 0
    place = torch.where(stays, became, left)
    members = place.new_zeros((place.shape[0], left + 1)).scatter_add(1, place, torch.ones_like(place))
    alone = stays & (members.gather(1, place) == 1)
    # Dropped ones first, then fused ones. So many of both there are where the fused become one.
    lost = (stays.long() + alone.long()).argsort(dim=1, stable=True)[:, : count - left + 1]
    x, s = take_rows(entering.image, lost).float(), leaving.image.float()
    with full_precision(x.device):
        # Half the squared distance, less what all candidates of a token share.
        distance = torch.baddbmm(0.5 * s.square().sum(2).unsqueeze(1), x, s.transpose(1, 2), alpha=-1)
    similar = torch.where(alone.gather(1, lost), became.gather(1, lost), distance.argmin(2))
    return became.scatter(1, lost, similar)
