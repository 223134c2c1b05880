"""How much memory a forward holds at its peak: what people have to have, and what a smaller batch saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokencut.composite import plain_parts
from tokencut.runtime.capturing import CapturedModel


def peak_memory(forward: Callable[[Tensor], object], images: Tensor) -> float | None:
    """Memory held at the peak of a forward, in MiB: weights, images, and what is computed.

    On a GPU its allocator tells. The processor's does not, so there the results of all operators are added up for as
    long as somebody holds them: the same figure in every run and on every machine, without the scratch memory that some
    operators use inside.

    Args:
        forward: What to call. On a CPU it has to be an `nn.Module`, whose weights are known.
        images: A batch `(B, C, H, W)`, on the model's device.

    Returns:
        The peak; None where neither way is open (other devices, compiled and exported models on a CPU, CUDA graphs,
        whose memory the allocator has set aside).
    """
    if isinstance(forward, CapturedModel):
        return None
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        forward(images)
        torch.cuda.synchronize(images.device)
        return torch.cuda.max_memory_allocated(images.device) / 2**20
    if images.device.type != "cpu" or not isinstance(forward, nn.Module) or not any(True for _ in forward.parameters()):
        return None
    # Weights that autocast has cast for an earlier forward would not be seen.
    torch.clear_autocast_cache()
    with _Held((*forward.parameters(), *forward.buffers(), images)) as held:
        forward(images)
    return held.peak / 2**20


class _Held(TorchDispatchMode):
    """While active, adds up the storages that operators return, for as long as they live.

    Attributes:
        peak: The most bytes held at once so far.
    """

    def __init__(self, before: tuple[Tensor, ...]) -> None:
        """Starts with what is there before.

        Args:
            before: Tensors that live throughout.
        """
        super().__init__()
        parts = (part for tensor in before for part in plain_parts(tensor))
        self._always = {storage.data_ptr(): storage.nbytes() for storage in map(_storage, parts)}
        self._held: list[tuple[StorageWeakRef, int]] = []
        self.peak = sum(self._always.values())

    def __torch_dispatch__(
        self, operator: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        self._held = [(storage, size) for storage, size in self._held if not storage.expired()]
        known = {storage.cdata for storage, _ in self._held}
        for tensor in _tensors(result):
            storage = _storage(tensor)
            reference = StorageWeakRef(storage)
            if reference.cdata not in known and storage.data_ptr() not in self._always:
                known.add(reference.cdata)
                self._held.append((reference, storage.nbytes()))
        self.peak = max(self.peak, sum(self._always.values()) + sum(size for _, size in self._held))
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    return (part for leaf in tree_leaves(result) if isinstance(leaf, Tensor) for part in plain_parts(leaf))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
