"""Several processes that train as one: what `torchrun` starts, and what they tell each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokencut.errors import UsageError


def started_by_torchrun() -> bool:
    """Whether this process is one of several (or the only one) that `torchrun` started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True)
class Group:
    """The processes that work together.

    Attributes:
        rank: The number of this process, from 0 on; process 0 writes and prints.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)).item()) if self.size > 1 else flag

    def all_reduce_gradients(self, module: nn.Module) -> None:
        """Sums the gradients over all processes, in one message per type; a missing one counts as 0."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for weight in module.parameters():
            if weight.requires_grad:
                by_type.setdefault(weight.dtype, []).append(weight)
        for weights in by_type.values():
            parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            flat = self.all_reduce(torch.cat([part.reshape(-1) for part in parts]))
            for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
                weight.grad = part.view_as(weight)

    def broadcast(self, value: Any) -> Any:
        """What process 0 holds, given to all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """What every process holds, in order, given to all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Gives every process the weights and buffers of process 0."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)


def single_process(device: torch.device) -> Group:
    """A group of this process only."""
    return Group(0, 1, device)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """Joins the processes of a `torchrun`, over nccl on GPUs (one each) and gloo elsewhere; alone without one.

    Args:
        device: What was asked for; each process takes the GPU of its own number on its machine.

    Raises:
        UsageError: There are fewer GPUs than processes.
    """
    if not started_by_torchrun():
        yield single_process(device)
        return
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(f"torchrun started process {local + 1} on a machine of {torch.cuda.device_count()} GPUs; "
                             f"type torchrun --nproc-per-node {torch.cuda.device_count()}")  # fmt: skip
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
