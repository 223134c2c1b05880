"""The header of a tokencut file, which says what its model is: read without torch, since that takes seconds to load."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tokencut.errors import ArtifactError, TokencutError, UsageError
from tokencut.files import open_plain, unlike_a_file, user_path, with_ending
from tokencut.messages import one_line
from tokencut.models.exported import WHAT, is_exported
from tokencut.models.metadata import ArtifactInfo, info_from_text

SUFFIX = ".safetensors"
# The one metadata key.
KEY = "tokencut"

_STORED = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16", "I8": "int8", "F8_E4M3": "fp8"}


def read_header(path: str | os.PathLike[str]) -> ArtifactInfo:
    """What a file says about its model, as it stands there: `artifact.read_info` asks timm whether it can be built.

    Raises:
        ArtifactError: Not a tokencut file, or damaged, or of a newer format.
    """
    source = user_path(path)
    with open_artifact(source, framework="np") as file:
        return info_of(file, source, as_written=True)


def open_artifact(path: Path, framework: str = "pt") -> AbstractContextManager[Any]:
    """Opens a tokencut file, as `open_safetensors` does.

    Raises:
        UsageError: There is no such file.
        ArtifactError: See there.
    """
    what = unlike_a_file(path)
    if what is not None:
        made = with_ending(path, SUFFIX, "out")
        raise UsageError(f"{path} {what}; type `tokencut.save(model, {str(made)!r})` to make one")
    return open_safetensors(path, framework=framework)


def info_of(file: Any, path: Path, *, as_written: bool = False) -> ArtifactInfo:
    """What an opened file says about its model.

    Args:
        file: As `open_safetensors` gives it.
        path: Its path, for errors.
        as_written: See `info_from_text`.

    Raises:
        ArtifactError: It is no tokencut file, or damaged, or of a newer format.
    """
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise ArtifactError(f"{path} holds weights without a tokencut recipe; name their architecture and type "
                            f"`checkpoint={str(path)!r}`")  # fmt: skip
    try:
        info = info_from_text(text, as_written=as_written)
    except ArtifactError as error:
        raise ArtifactError(f"cannot load {path}: {error}") from error
    slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
    types = sorted({_STORED.get(part.get_dtype(), part.get_dtype()) for part in slices})
    numbers = sum(math.prod(part.get_shape()) for part in slices)
    return dataclasses.replace(info, dtype="+".join(types), parameters=numbers)


def file_kind(path: Path) -> str:
    """What a file is by its first bytes: `safetensors`, `pickle` (PyTorch's own, zipped or not), `empty` or `other`."""
    with open_plain(path) as file:
        start = file.read(9)
    if not start:
        return "empty"
    # safetensors: the header's length in eight bytes, then JSON, which may be as long as 100 MB.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000:
        return "safetensors"
    # A pickle of protocol 2 to 5, or the zip archive that torch.save writes.
    if start[:4] == b"PK\x03\x04" or (start[0] == 0x80 and 2 <= start[1] <= 5):
        return "pickle"
    return "other"


@contextmanager
def open_safetensors(path: Path, error: type[TokencutError] = ArtifactError, *, framework: str = "pt") -> Iterator[Any]:
    """Opens a safetensors file to read its header or single tensors.

    Args:
        path: An existing file.
        error: The class of error to raise.
        framework: Whose tensors it gives: `pt` loads torch, `np` does not.

    Yields:
        What `safetensors.safe_open` gives.

    Raises:
        TokencutError: Of the class asked for: not a safetensors file (saying what it is), damaged, or unreadable.
    """
    try:
        kind = file_kind(path)
        if kind == "pickle":
            raise error(f"{path} is a pickled PyTorch file, not safetensors; name its architecture as MODEL and pass "
                        f"it, with the suffix .pth, as `checkpoint={str(path.with_suffix('.pth'))!r}`")  # fmt: skip
        if kind != "safetensors" and is_exported(path):
            raise error(f"{path} is {WHAT.format('name the tokencut file that')}")
        if kind != "safetensors":
            what = "is empty" if kind == "empty" else "is not a safetensors file"
            raise error(f"{path} {what}; give a file that `tokencut.save(model, 'FILE')` wrote, or a model's name")
        with safe_open(str(path), framework=framework) as file:
            yield file
    except SafetensorError as problem:
        raise error(f"{path} is truncated or damaged ({one_line(problem)}); copy or write it again") from problem
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or one_line(problem)}") from problem
