"""The phases of density-peak clustering on a GPU, each for some tokens of one image.

A token is compared with the others of its window, `OTHERS` of them at a time side by side: each of these lanes keeps
what it has found, and lanes meet only at the end. Each phase writes what the next reads, for all tokens: a barrier or
another launch stands between two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokencut.ops.kernels.launching import Kernel

TINY = tl.constexpr(1.1754943508222875e-38)  # a sum below it has lost its digits
NO_DISTANCE = tl.constexpr(1e-5)  # as in `ops.density_peaks`
LONGEST = tl.constexpr(10.0)  # as in `ops.grouping`


@triton.jit
def log_density(nearest, lengths, balance, WIDTH: tl.constexpr, SCALE_FREE: tl.constexpr, COSINE: tl.constexpr):
    """Log density of points by the mean squared distance to their nearest and their squared lengths."""
    if SCALE_FREE:
        if COSINE:
            lengths = (lengths > TINY).to(tl.float32)
        density = -0.5 * balance * tl.log(tl.maximum(nearest, tl.maximum(lengths * NO_DISTANCE, TINY)))
    else:
        density = -nearest / WIDTH
    return density


@triton.jit
def _four_nearest(a, b, c, d, e, f, g, h):
    """The four smallest of two ascending rows of four, ascending."""
    second = tl.minimum(tl.minimum(b, f), tl.maximum(a, e))
    third = tl.minimum(tl.minimum(c, g), tl.minimum(tl.maximum(b, e), tl.maximum(a, f)))
    fourth = tl.minimum(tl.minimum(d, h), tl.minimum(tl.maximum(c, e), tl.maximum(a, g)))
    return tl.minimum(a, e), second, third, tl.minimum(fourth, tl.maximum(b, f))


@triton.jit
def _nearer(distance, number, other_distance, other_number):
    """The nearer of two, the lower number of two as near."""
    first = (distance < other_distance) | ((distance == other_distance) & (number < other_number))
    return tl.where(first, distance, other_distance), tl.where(first, number, other_number)


@triton.jit
def _seen(image, own, start, count, window, OTHERS: tl.constexpr):
    """For `OTHERS` tokens of each owned token's window: their numbers, where their distances are, and which exist."""
    base = own // window * window
    place = start + tl.arange(0, OTHERS)
    others = base[None, :] + place[:, None]
    there = (image * count + others) * window + (own - base)[None, :]
    return others, there, (place[:, None] < window) & (others < count) & (own[None, :] < count)


@triton.jit
def _squared_lengths(image, tokens, distances, count, window):
    """Squared lengths of tokens, which stand on the diagonals of the distances."""
    return tl.load(distances + (image * count + tokens) * window + tokens % window, mask=tokens < count, other=0.0)


@triton.jit
def _given(values, places, inside, THERE: tl.constexpr):
    """Values at some places, 0 outside; 1 each where none are there."""
    return tl.load(values + places, mask=inside, other=0.0) if THERE else inside.to(tl.float32)


@triton.jit
def _density(image, own, distances, sizes, densities, count, window, mass, balance,
             WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr, MASS: tl.constexpr, SCALE_FREE: tl.constexpr,
             COSINE: tl.constexpr, OTHERS: tl.constexpr):  # fmt: skip
    """Log density of the owned tokens."""
    first = tl.full((OTHERS, own.shape[0]), float("inf"), tl.float32)
    second, third, fourth = first, first, first
    for start in range(0, window, OTHERS):
        others, there, inside = _seen(image, own, start, count, window, OTHERS)
        squared = tl.load(distances + there, mask=inside & (others != own[None, :]), other=float("inf"))
        if NEIGHBOURS > 4:
            fourth = tl.minimum(fourth, tl.maximum(third, squared))
        third = tl.minimum(third, tl.maximum(second, squared))
        second = tl.minimum(second, tl.maximum(first, squared))
        first = tl.minimum(first, squared)
    nearest, next_nearest, third, fourth = tl.reduce((first, second, third, fourth), 0, _four_nearest)
    total = nearest + next_nearest
    if NEIGHBOURS > 3:
        total += third
    if NEIGHBOURS > 4:
        total += fourth
    here = image * count + own
    lengths = _squared_lengths(image, own, distances, count, window)
    density = log_density(total / NEIGHBOURS, lengths, balance, WIDTH, SCALE_FREE, COSINE)
    if MASS:
        density += mass * tl.log(tl.load(sizes + here, mask=own < count, other=1.0))
    tl.store(densities + here, density, mask=own < count)


@triton.jit
def _score(image, own, distances, densities, scores, count, window, OTHERS: tl.constexpr):
    """Log density plus log separation of the owned tokens; the densest of a window comes before all."""
    mine = tl.load(densities + image * count + own, mask=own < count, other=0.0)
    separation = tl.full((OTHERS, own.shape[0]), float("inf"), tl.float32)
    for start in range(0, window, OTHERS):
        others, there, inside = _seen(image, own, start, count, window, OTHERS)
        theirs = tl.load(densities + image * count + others, mask=inside, other=-float("inf"))
        squared = tl.load(distances + there, mask=inside, other=float("inf"))
        earlier = (theirs == mine[None, :]) & (others < own[None, :])
        denser = (theirs > mine[None, :]) | earlier
        separation = tl.minimum(separation, tl.where(denser, squared, float("inf")))
    apart = tl.min(separation, 0)
    score = tl.where(apart == float("inf"), float("inf"), mine + 0.5 * tl.log(apart))
    tl.store(scores + image * count + own, score, mask=own < count)


@triton.jit
def _choose(image, own, scores, centres, count, clusters, OTHERS: tl.constexpr):
    """1 for the owned tokens that are among those of highest score in the image, ties to the lower number."""
    mine = tl.load(scores + image * count + own, mask=own < count, other=0.0)
    before = tl.zeros((OTHERS, own.shape[0]), tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        theirs = tl.load(scores + image * count + others, mask=others < count, other=-float("inf"))
        earlier = (theirs[:, None] == mine[None, :]) & (others[:, None] < own[None, :])
        ahead = ((theirs[:, None] > mine[None, :]) | earlier) & (others[:, None] < count)
        before += ahead.to(tl.int32)
    tl.store(centres + image * count + own, (tl.sum(before, 0) < clusters).to(tl.int32), mask=own < count)


@triton.jit
def join_centres(image, own, distances, centres, joined, count, window, OTHERS: tl.constexpr):
    """The number of the centre that each owned token is nearest to; a centre joins itself."""
    nearest = tl.full((OTHERS, own.shape[0]), float("inf"), tl.float32)
    centre = tl.zeros((OTHERS, own.shape[0]), tl.int32) + (own // window * window)[None, :]
    for start in range(0, window, OTHERS):
        others, there, inside = _seen(image, own, start, count, window, OTHERS)
        is_centre = tl.load(centres + image * count + others, mask=inside, other=0)
        squared = tl.load(distances + there, mask=is_centre > 0, other=float("inf"))
        centre = tl.where(squared < nearest, others, centre)
        nearest = tl.minimum(nearest, squared)
    _, found = tl.reduce((nearest, centre), 0, _nearer)
    itself = tl.load(centres + image * count + own, mask=own < count, other=0)
    tl.store(joined + image * count + own, tl.where(itself > 0, own, found), mask=own < count)


@triton.jit
def _average(image, own, distances, group, weight, sizes, first, share, held, inner, long, count, window, groups,
             KEEP_NORM: tl.constexpr, WEIGHTED: tl.constexpr, SIZED: tl.constexpr, OTHERS: tl.constexpr):  # fmt: skip
    """First member of each owned token's group (all are in its window), its coefficient, and what the group holds.

    Where norms are kept also the average length of the members, and the product of each token with the average.
    """
    here = image * count + own
    mine = tl.load(group + here, mask=own < count, other=-1)
    begins = tl.full((OTHERS, own.shape[0]), 0, tl.int32) + count
    weights = tl.zeros((OTHERS, own.shape[0]), tl.float32)
    patches = tl.zeros((OTHERS, own.shape[0]), tl.float32)
    lengths = tl.zeros((OTHERS, own.shape[0]), tl.float32)
    products = tl.zeros((OTHERS, own.shape[0]), tl.float32)
    for start in range(0, window, OTHERS):
        others, apart, inside = _seen(image, own, start, count, window, OTHERS)
        there = image * count + others
        fellow = tl.load(group + there, mask=inside, other=-2) == mine[None, :]
        begins = tl.minimum(begins, tl.where(fellow, others, count))
        theirs = tl.where(fellow, _given(weight, there, inside, WEIGHTED), 0.0)
        weights += theirs
        patches += tl.where(fellow, _given(sizes, there, inside, SIZED), 0.0)
        if KEEP_NORM:
            squared = tl.load(distances + there * window + others % window, mask=fellow & inside, other=0.0)
            long_by = theirs * tl.sqrt(squared)
            lengths += long_by
            # 1 less half the squared distance of points of length 1 is their cosine.
            other = fellow & inside & (others != own[None, :])
            products += long_by * (1.0 - 0.5 * tl.load(distances + apart, mask=other, other=0.0))
    total, together = tl.sum(weights, 0), tl.sum(patches, 0)
    heavy = _given(weight, here, own < count, WEIGHTED)
    size = _given(sizes, here, own < count, SIZED)
    coefficient = tl.where(total >= TINY, heavy / tl.maximum(total, TINY), size / together)
    # A token that is dropped has the group number `groups`, and no first member.
    tl.store(first + here, tl.where(mine < groups, tl.min(begins, 0), count), mask=own < count)
    tl.store(share + here, coefficient, mask=own < count)
    tl.store(held + here, together, mask=own < count)
    if KEEP_NORM:
        length = tl.sqrt(_squared_lengths(image, own, distances, count, window))
        tl.store(long + here, tl.sum(lengths, 0) / tl.maximum(total, TINY), mask=own < count)
        tl.store(inner + here, length * tl.sum(products, 0) / tl.maximum(total, TINY), mask=own < count)


@triton.jit
def _lengthen(image, own, group, weight, share, inner, long, count, window, WEIGHTED: tl.constexpr,
              OTHERS: tl.constexpr):  # fmt: skip
    """The owned tokens' coefficients, scaled so that a group's average is as long as its members."""
    here = image * count + own
    mine = tl.load(group + here, mask=own < count, other=-1)
    squares = tl.zeros((OTHERS, own.shape[0]), tl.float32)
    weights = tl.zeros((OTHERS, own.shape[0]), tl.float32)
    for start in range(0, window, OTHERS):
        others, _, inside = _seen(image, own, start, count, window, OTHERS)
        there = image * count + others
        fellow = (tl.load(group + there, mask=inside, other=-2) == mine[None, :]) & inside
        theirs = _given(weight, there, fellow, WEIGHTED)
        weights += theirs
        squares += theirs * tl.load(inner + there, mask=fellow, other=0.0)
    total = tl.sum(weights, 0)
    merged = tl.sqrt(tl.maximum(tl.sum(squares, 0) / tl.maximum(total, TINY), TINY))
    factor = tl.load(long + here, mask=own < count, other=1.0) / merged
    # A token alone passes unchanged, and so do weights that add up to nothing.
    factor = tl.where((tl.abs(factor - 1.0) < 1e-5) | (total < TINY), 1.0, tl.minimum(factor, LONGEST))
    coefficient = tl.load(share + here, mask=own < count, other=0.0)
    tl.store(share + here, coefficient * factor, mask=own < count)


@triton.jit
def _number(image, own, first, begun, held, ordered, leaving, count, groups, ALL: tl.constexpr,
            OTHERS: tl.constexpr):  # fmt: skip
    """The number of each owned token's group by the order of first members, and the groups' sizes in that order."""
    begins = tl.load(first + image * count + own, mask=own < count, other=-1)
    if ALL:  # all tokens of the image are owned
        tl.store(begun + image * count + own, tl.cumsum((begins == own).to(tl.int32), 0), mask=own < count)
        tl.debug_barrier()
        number = tl.load(begun + image * count + begins, mask=(begins >= 0) & (begins < count), other=1) - 1
    else:
        before = tl.zeros((OTHERS, own.shape[0]), tl.int32)
        for start in range(0, count, OTHERS):
            others = start + tl.arange(0, OTHERS)
            theirs = tl.load(first + image * count + others, mask=others < count, other=-1)
            before += ((theirs == others)[:, None] & (others[:, None] <= begins[None, :])).to(tl.int32)
        number = tl.sum(before, 0) - 1
    # No more groups than there is room for, even where features are not numbers.
    number = tl.where(begins < count, tl.minimum(number, groups - 1), groups)
    tl.store(ordered + image * count + own, number.to(tl.int64), mask=own < count)
    patches = tl.load(held + image * count + own, mask=own < count, other=0.0)
    tl.store(leaving + image * groups + number, patches, mask=(own < count) & (begins == own))


@triton.jit
def _phase(
    image, own, distances, floats, integers, group, weight, sizes, ordered, share, leaving, count, window, plane,
    clusters, groups, mass, balance, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr, MASS: tl.constexpr,
    SCALE_FREE: tl.constexpr, COSINE: tl.constexpr, KEEP_NORM: tl.constexpr, WEIGHTED: tl.constexpr,
    SIZED: tl.constexpr, OTHERS: tl.constexpr, ALL: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """One phase for the owned tokens of an image; the next one needs it done for all of its tokens."""
    densities, scores, held = floats, floats + plane, floats + 2 * plane
    centres, first = integers, integers + plane
    if PHASE == 0:
        _density(image, own, distances, sizes, densities, count, window, mass, balance, WIDTH, NEIGHBOURS, MASS,
                 SCALE_FREE, COSINE, OTHERS)  # fmt: skip
    if PHASE == 1:
        _score(image, own, distances, densities, scores, count, window, OTHERS)
    if PHASE == 2:
        _choose(image, own, scores, centres, count, clusters, OTHERS)
    if PHASE == 3:
        join_centres(image, own, distances, centres, group, count, window, OTHERS)
    if PHASE == 4:  # densities and scores have done their work: their places are free
        _average(image, own, distances, group, weight, sizes, first, share, held, densities, scores, count, window,
                 groups, KEEP_NORM, WEIGHTED, SIZED, OTHERS)  # fmt: skip
    if PHASE == 5:  # and so is the place of the centres
        if KEEP_NORM:
            _lengthen(image, own, group, weight, share, densities, scores, count, window, WEIGHTED, OTHERS)
        _number(image, own, first, centres, held, ordered, leaving, count, clusters, ALL, OTHERS)


@Kernel
@triton.jit
def run_phases(
    distances, integers, group, weight, sizes, ordered, share, leaving, count, window, plane, behind, joined, clusters,
    groups, mass, balance, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr, MASS: tl.constexpr, SCALE_FREE: tl.constexpr,
    COSINE: tl.constexpr, KEEP_NORM: tl.constexpr, WEIGHTED: tl.constexpr, SIZED: tl.constexpr, OWN: tl.constexpr,
    OTHERS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Phases `FIRST` to `LAST`: all of an image by one program, or one phase of a part of it.

    `weight` and `sizes` are read where there are such, `WEIGHTED` and `SIZED`; else all points weigh 1 and hold 1.
    Three numbers for each point stand `behind` the distances, as many integers in `integers`; the groups are from
    `joined` on in `group`, which is the last of those or has been given.
    """
    image = tl.program_id(1).to(tl.int64)
    floats, group = distances + behind, group + joined
    for phase in tl.static_range(FIRST, LAST + 1):
        if WHOLE:
            for start in range(0, count, OWN):
                _phase(image, start + tl.arange(0, OWN), distances, floats, integers, group, weight, sizes, ordered,
                       share, leaving, count, window, plane, clusters, groups, mass, balance, WIDTH, NEIGHBOURS, MASS,
                       SCALE_FREE, COSINE, KEEP_NORM, WEIGHTED, SIZED, OTHERS, ALL, phase)  # fmt: skip
            tl.debug_barrier()  # what one thread has written another will read
        else:
            _phase(image, tl.program_id(0) * OWN + tl.arange(0, OWN), distances, floats, integers, group, weight, sizes,
                   ordered, share, leaving, count, window, plane, clusters, groups, mass, balance, WIDTH, NEIGHBOURS,
                   MASS, SCALE_FREE, COSINE, KEEP_NORM, WEIGHTED, SIZED, OTHERS, False, phase)  # fmt: skip
