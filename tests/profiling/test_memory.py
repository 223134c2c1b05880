"""What a forward holds at its peak: by hand, against torch's profiler, and less where fewer tokens stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from tokencut.model import compress
from tokencut.profiling.latency import measure
from tokencut.profiling.memory import peak_memory

MIB = 2**20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads take longer to meet than these models take to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Chain(nn.Module):
    """Three results of 4, 8 and 2 MiB, of which the first two live at once, and then the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(MIB // 4))
        self.register_buffer("shift", torch.zeros(MIB // 8))

    def forward(self, images: Tensor) -> Tensor:
        first = images.repeat(1, 2, 1, 1)
        views = first.view(-1).view_as(first).detach()
        second = views.repeat(1, 2, 1, 1)
        del first, views
        return second.add_(1)[:, ::4].clone()


def test_by_hand() -> None:
    images = torch.zeros(1, 2, 512, 512)
    assert images.nbytes == 2 * MIB
    # Weights 1, buffers 0.5, images 2; then 4, and 8 beside it; then 2 beside the 8.
    assert peak_memory(Chain(), images) == 1 + 0.5 + 2 + 4 + 8


def test_weights_that_are_read_through_views_count_once() -> None:
    layer = nn.Linear(512, 512, bias=False)
    images = torch.zeros(2, 512)
    with torch.no_grad():
        assert peak_memory(layer, images) == (512 * 512 + 2 * 2 * 512) * 4 / MIB


def test_weights_cast_by_autocast_count_each_time() -> None:
    layer = nn.Linear(512, 512, bias=False)
    images = torch.zeros(2, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(images)
        first = peak_memory(layer, images)
        assert first == peak_memory(layer, images)
    # The weights in both precisions, the images in both, and the result.
    assert first == (512 * 512 * (4 + 2) + 2 * 512 * (4 + 2 + 2)) / MIB


def test_nobody_tells_of_what_is_no_module_or_has_no_weights() -> None:
    assert peak_memory(lambda images: images + 1, torch.zeros(1)) is None
    assert peak_memory(nn.ReLU(), torch.zeros(1)) is None
    assert peak_memory(nn.Linear(1, 1), torch.zeros(1, device="meta")) is None


def vit(keep: float, layers: tuple[int, ...] = (1, 2)) -> nn.Module:
    torch.manual_seed(0)
    return compress(timm.create_model("test_vit", img_size=96, depth=2, mlp_ratio=4.0), keep=keep, layers=layers).eval()


def test_falls_with_keep() -> None:
    """Down to what the attention before the first stage holds, which sees all tokens."""
    images = torch.randn(16, 3, 96, 96)
    with torch.no_grad():
        peaks = [peak_memory(vit(keep), images) or 0.0 for keep in (0.95, 0.85, 0.75, 0.5)]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] > peaks[1] > peaks[3]
        assert peak_memory(vit(0.5), images) == peaks[3]


def test_agrees_with_torchs_profiler(capfd: pytest.CaptureFixture[str]) -> None:
    """Which sees the allocator itself, and prints what nobody can keep off stderr."""
    model, images = vit(0.5), torch.randn(16, 3, 96, 96)
    with torch.no_grad():
        model(images)
        with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as trace:
            model(images)
        events = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        before = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), images))
        # Scratch memory inside an operator is a few KB here.
        assert peak_memory(model, images) == pytest.approx((before + peak) / MIB, rel=0.01)
    capfd.readouterr()


def test_stands_in_timings() -> None:
    timing = measure({"it": nn.Linear(512, 512)}, torch.zeros(2, 512), rounds=3, min_seconds=0.0)["it"]
    assert timing.peak_memory_mib == pytest.approx(1.0, rel=0.02)


@pytest.mark.gpu
def test_falls_with_keep_on_a_gpu() -> None:
    images = torch.randn(16, 3, 96, 96, device="cuda")
    with torch.no_grad():
        peaks = [peak_memory(vit(keep).cuda(), images) or 0.0 for keep in (0.9, 0.3)]
    assert peaks[0] > peaks[1]
