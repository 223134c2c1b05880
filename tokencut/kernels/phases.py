"""The phases of density-peak clustering on a GPU, each for some tokens of one image.

A thread owns a token and walks over the others, so that nothing is reduced across threads. Each phase writes what the
next reads, for all tokens: a barrier or another launch stands between two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _three_nearest(a, b, c, d, e, f):
    """The three smallest of two ascending triples, ascending."""
    first, middle = tl.minimum(a, d), tl.maximum(a, d)
    low, high = tl.minimum(b, e), tl.maximum(b, e)
    second = tl.minimum(middle, low)
    third = tl.minimum(tl.minimum(tl.maximum(middle, low), high), tl.minimum(c, f))
    return first, second, third


@triton.jit
def _density(image, own, distances, sizes, densities, farthest, count, mass,
             WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr, SIZED: tl.constexpr,
             OTHERS: tl.constexpr):  # fmt: skip
    """Log density of the owned tokens, and their largest distance."""
    first = tl.full(own.shape, float("inf"), tl.float32)
    second, third, far = first, first, tl.zeros(own.shape, tl.float32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        inside = (others[:, None] < count) & (own[None, :] < count)
        squared = tl.load(distances + (image * count + others[:, None]) * count + own[None, :], mask=inside, other=0.0)
        far = tl.maximum(far, tl.max(squared, 0))
        near = tl.where(inside & (others[:, None] != own[None, :]), squared, float("inf"))
        none = tl.full(near.shape, float("inf"), tl.float32)
        a, b, c = tl.reduce((near, none, none), 0, _three_nearest)
        first, second, third = _three_nearest(first, second, third, a, b, c)
    total = first + second
    if NEIGHBOURS > 3:
        total += third
    density = -(total / NEIGHBOURS) / WIDTH
    here = image * count + own
    if SIZED:
        density += mass * tl.log(tl.load(sizes + here, mask=own < count, other=1.0))
    tl.store(densities + here, density, mask=own < count)
    tl.store(farthest + here, far, mask=own < count)


@triton.jit
def _score(image, own, distances, densities, farthest, scores, count, OTHERS: tl.constexpr):
    """Log density plus log separation of the owned tokens."""
    mine = tl.load(densities + image * count + own, mask=own < count, other=0.0)
    separation = tl.full(own.shape, float("inf"), tl.float32)
    largest = tl.zeros((OTHERS,), tl.float32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        theirs = tl.load(densities + image * count + others, mask=others < count, other=-float("inf"))
        squared = tl.load(distances + (image * count + others[:, None]) * count + own[None, :],
                          mask=(others[:, None] < count) & (own[None, :] < count), other=float("inf"))  # fmt: skip
        earlier = (theirs[:, None] == mine[None, :]) & (others[:, None] < own[None, :])
        denser = (theirs[:, None] > mine[None, :]) | earlier
        separation = tl.minimum(separation, tl.min(tl.where(denser, squared, float("inf")), 0))
        largest = tl.maximum(largest, tl.load(farthest + image * count + others, mask=others < count, other=0.0))
    separation = tl.where(separation == float("inf"), tl.max(largest, 0), separation)
    tl.store(scores + image * count + own, mine + 0.5 * tl.log(separation), mask=own < count)


@triton.jit
def _choose(image, own, scores, centres, count, clusters, OTHERS: tl.constexpr):
    """1 for the owned tokens that are among those of highest score, ties to the lower number."""
    mine = tl.load(scores + image * count + own, mask=own < count, other=0.0)
    rank = tl.zeros(own.shape, tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        theirs = tl.load(scores + image * count + others, mask=others < count, other=-float("inf"))
        earlier = (theirs[:, None] == mine[None, :]) & (others[:, None] < own[None, :])
        before = ((theirs[:, None] > mine[None, :]) | earlier) & (others[:, None] < count)
        rank += tl.sum(before.to(tl.int32), 0)
    tl.store(centres + image * count + own, (rank < clusters).to(tl.int32), mask=own < count)


@triton.jit
def _join(image, own, distances, centres, joined, count, OTHERS: tl.constexpr):
    """The number of the centre that each owned token is nearest to; a centre joins itself."""
    nearest = tl.full(own.shape, float("inf"), tl.float32)
    centre = tl.zeros(own.shape, tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        is_centre = tl.load(centres + image * count + others, mask=others < count, other=0)
        squared = tl.load(distances + (image * count + others[:, None]) * count + own[None, :],
                          mask=(is_centre[:, None] > 0) & (own[None, :] < count), other=float("inf"))  # fmt: skip
        least, place = tl.min(squared, 0, return_indices=True)
        centre = tl.where(least < nearest, start + place, centre)
        nearest = tl.minimum(nearest, least)
    itself = tl.load(centres + image * count + own, mask=own < count, other=0)
    tl.store(joined + image * count + own, tl.where(itself > 0, own, centre), mask=own < count)


@triton.jit
def _average(image, own, group, weight, sizes, first, share, held, count, groups,
             OTHERS: tl.constexpr):  # fmt: skip
    """The first member of each owned token's group, the token's coefficient, and the patches that the group holds."""
    here = image * count + own
    mine = tl.load(group + here, mask=own < count, other=-1)
    begins = tl.full(own.shape, count, tl.int32)
    weights = tl.zeros(own.shape, tl.float32)
    patches = tl.zeros(own.shape, tl.float32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        there = image * count + others
        theirs = tl.load(group + there, mask=others < count, other=-2)
        heavy = tl.load(weight + there, mask=others < count, other=0.0)
        size = tl.load(sizes + there, mask=others < count, other=0.0)
        fellow = theirs[:, None] == mine[None, :]
        begins = tl.minimum(begins, tl.min(tl.where(fellow, others[:, None], count), 0))
        weights += tl.sum(tl.where(fellow, heavy[:, None], 0.0), 0)
        patches += tl.sum(tl.where(fellow, size[:, None], 0.0), 0)
    heavy = tl.load(weight + here, mask=own < count, other=0.0)
    size = tl.load(sizes + here, mask=own < count, other=0.0)
    tiny = 1.1754943508222875e-38  # a sum below it has lost its digits
    coefficient = tl.where(weights >= tiny, heavy / tl.maximum(weights, tiny), size / patches)
    # A token that is dropped has the group number `groups`, and no first member.
    tl.store(first + here, tl.where(mine < groups, begins, count), mask=own < count)
    tl.store(share + here, coefficient, mask=own < count)
    tl.store(held + here, patches, mask=own < count)


@triton.jit
def _number(image, own, first, held, ordered, leaving, count, groups, OTHERS: tl.constexpr):
    """The number of each owned token's group by the order of first members, and the groups' sizes in that order."""
    begins = tl.load(first + image * count + own, mask=own < count, other=0)
    number = tl.full(own.shape, -1, tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        theirs = tl.load(first + image * count + others, mask=others < count, other=-1)
        begun = (theirs == others)[:, None] & (others[:, None] <= begins[None, :])
        number += tl.sum(begun.to(tl.int32), 0)
    # No more groups than there is room for, even where features are not numbers.
    number = tl.where(begins < count, tl.minimum(number, groups - 1), groups)
    tl.store(ordered + image * count + own, number.to(tl.int64), mask=own < count)
    patches = tl.load(held + image * count + own, mask=own < count, other=0.0)
    tl.store(leaving + image * groups + number, patches, mask=(own < count) & (begins == own))


@triton.jit
def _phase(
    image, own, distances, group, weight, sizes, floats, integers, share, ordered, leaving, count, plane, clusters,
    groups, mass, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr, SIZED: tl.constexpr, OTHERS: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """One phase for the owned tokens of an image; the next one needs it done for all of its tokens."""
    densities, farthest, scores, held = floats, floats + plane, floats + 2 * plane, floats + 3 * plane
    centres, first = integers, integers + plane
    if PHASE == 0:
        _density(image, own, distances, sizes, densities, farthest, count, mass, WIDTH, NEIGHBOURS, SIZED, OTHERS)
    if PHASE == 1:
        _score(image, own, distances, densities, farthest, scores, count, OTHERS)
    if PHASE == 2:
        _choose(image, own, scores, centres, count, clusters, OTHERS)
    if PHASE == 3:
        _join(image, own, distances, centres, group, count, OTHERS)
    if PHASE == 4:
        _average(image, own, group, weight, sizes, first, share, held, count, groups, OTHERS)
    if PHASE == 5:
        _number(image, own, first, held, ordered, leaving, count, clusters, OTHERS)


@triton.jit
def run_phases(
    distances, group, weight, sizes, floats, integers, share, ordered, leaving, count, plane, clusters, groups, mass,
    WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr, SIZED: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Phases `FIRST` to `LAST`: all of an image by one program, or one phase of a part of it."""
    image = tl.program_id(1).to(tl.int64)
    for phase in tl.static_range(FIRST, LAST + 1):
        if WHOLE:
            for start in range(0, count, OWN):
                _phase(image, start + tl.arange(0, OWN), distances, group, weight, sizes, floats, integers, share,
                       ordered, leaving, count, plane, clusters, groups, mass, WIDTH, NEIGHBOURS, SIZED, OTHERS,
                       phase)  # fmt: skip
            tl.debug_barrier()  # what one thread has written another will read
        else:
            _phase(image, tl.program_id(0) * OWN + tl.arange(0, OWN), distances, group, weight, sizes, floats, integers,
                   share, ordered, leaving, count, plane, clusters, groups, mass, WIDTH, NEIGHBOURS, SIZED, OTHERS,
                   phase)  # fmt: skip
