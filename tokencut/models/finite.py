"""Which tensors of a safetensors file hold numbers that are none (NaN, infinity), by its bytes: no torch is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

# By type: how a number's bits are read, and those that are all set in NaN and in infinity alone: its exponent's, and of
# fp8 (e4m3), which has no infinity, all but the sign.
EXPONENTS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000), "F32": (np.uint32, 0x7F80_0000), "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80), "F8_E4M3": (np.uint8, 0x7F),
}  # fmt: skip
# So many numbers at a time: what they are compared with then stays in the processor's cache.
PART = 1 << 18


def not_finite_in(path: Path) -> list[str]:
    """The names of the tensors in which not all numbers are finite.

    Args:
        path: A safetensors file whose header is known to be sound.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = []
    for name, tensor in sorted(header.items()):
        count = math.prod(tensor["shape"]) if name != "__metadata__" else 0
        if count and tensor["dtype"] in EXPONENTS:
            kind, exponent = EXPONENTS[tensor["dtype"]]
            start = 8 + length + tensor["data_offsets"][0]
            bits = np.memmap(path, dtype=kind, mode="r", offset=start, shape=(count,))
            if any(_has_exponent(bits[at : at + PART], np.array(exponent, kind)) for at in range(0, count, PART)):
                found.append(name)
    return found


def _has_exponent(bits: np.ndarray, exponent: np.ndarray) -> bool:
    return bool(((bits & exponent) == exponent).any())
