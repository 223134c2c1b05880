"""Which images make a sample: drawn by a seed, in proportion to the classes, or spread evenly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tokencut.limits import check_number


def stratified(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Draws `count` images so that every class has its share of them.

    The draw goes by a hash of the seed and the image's number, so no library's random generator can ever change it.

    Args:
        labels: The class of every image.
        count: How many images to draw.
        seed: Another seed, another draw.

    Returns:
        The drawn images' numbers in `labels`, ascending.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    # A class gets the whole part of its share; the rest goes, one each, to the largest fractions, then the lower class.
    shares = {label: divmod(len(members[label]) * count, len(labels)) for label in sorted(members)}
    quota = {label: whole for label, (whole, _) in shares.items()}
    for label in sorted(shares, key=lambda label: -shares[label][1])[: count - sum(quota.values())]:
        quota[label] += 1

    def draw_order(index: int) -> str:
        return hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()

    return sorted(index for label in members for index in sorted(members[label], key=draw_order)[: quota[label]])


def strided_subset(total: int, limit: int | None) -> list[int]:
    """The numbers of the images in a sample of `limit` out of `total`, ascending, spread evenly and without chance.

    Args:
        total: How many images there are.
        limit: The size of the sample; all, if None or more than there are.

    Raises:
        UsageError: The limit is less than 1.
    """
    if limit is not None:
        check_number("limit", limit)
    count = total if limit is None else min(limit, total)
    return [position * total // count for position in range(count)]
