"""When a kernel stands in, and that a whole model with kernels gives what it gives without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from tokencut.methods import methods
from tokencut.model import compress
from tokencut.ops import kernels


def test_neither_on_a_cpu_or_an_old_gpu_nor_where_a_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        is_cuda = True
        requires_grad = True
        device = torch.device("cuda")

    tensor: Any = OnGPU()
    monkeypatch.setattr(kernels, "_FOUND", True)
    monkeypatch.setattr(kernels, "_capability", lambda device: (9, 0))
    assert not kernels.usable(torch.zeros(1))
    assert not kernels.usable(tensor)
    with torch.no_grad():
        assert kernels.usable(tensor)
        with monkeypatch.context() as older:
            older.setattr(kernels, "_capability", lambda device: (7, 5))
            assert not kernels.usable(tensor)
        monkeypatch.setattr(kernels, "_FOUND", False)
        assert not kernels.usable(tensor)


def test_kernels_start_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    @contextmanager
    def device(chosen: Any) -> Iterator[None]:
        entered.append(chosen)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launched = kernels.opaque("(Tensor given) -> Tensor", torch.empty_like)(torch.neg)
    tensor: Any = SimpleNamespace(is_cuda=True, device="cuda:1", get_device=lambda: 1)
    with pytest.raises(TypeError):  # it is no tensor
        launched(tensor)
    assert entered == ["cuda:1"]
    assert launched(torch.ones(1)).item() == -1
    assert entered == ["cuda:1"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", sorted(methods(keeps_grid=False)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_with_and_without_kernels(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = timm.create_model("deit_tiny_distilled_patch16_224", img_size=160)
    model = compress(dense, keep=0.6, method=method, prop_attn=True).cuda().to(dtype).eval()
    pixels = torch.randn(3, 3, 160, 160, device="cuda", dtype=dtype)
    with torch.no_grad():
        fast, seen = model.trace(pixels)
        monkeypatch.setattr(kernels, "_FOUND", False)
        slow, plain = model.trace(pixels)
    first = [trace.tokens.source for trace in (seen[0], plain[0])]
    assert first[0] is not None
    # The same tokens enter the first stage: it must decide alike, but for ties of rounded sums.
    assert (first[0] == first[1]).float().mean() > 0.98
    torch.testing.assert_close(fast, slow, rtol=0.1, atol=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("method", "name"),
    [(method, "deit_tiny_distilled_patch16_224") for method in ("bat", "evit", "kmedoids", "random", "tome", "topk")]
    + [
        ("topk", name) for name in ("vit_base_patch16_siglip_224", "cait_xxs24_224", "vit_dlittle_patch16_reg1_gap_256")
    ],
)
def test_a_model_by_kernels_is_the_model_without(
    method: str, name: str, gradient: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, logits and gradients, whatever a family's class attention is; in Triton's interpreter where
    there is no GPU.
    """
    pytest.importorskip("triton")
    dense = timm.create_model(name, img_size=80, embed_dim=48, num_heads=3, depth=4)
    model = compress(dense.eval(), keep=0.6, method=method, layers=[2, 3], prop_attn=True).to(device)
    pixels, weight = torch.randn(2, 3, 80, 80, device=device), model.model.patch_embed.proj.weight

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with torch.set_grad_enabled(gradient):
            _, traces = model.trace(pixels)
            logits = model(pixels)  # no source map is followed: stages may take other ways
        source = traces[-1].tokens.source
        assert source is not None
        return logits.detach(), source, torch.autograd.grad(logits.sum(), weight)[0] if gradient else None

    monkeypatch.setattr(kernels, "usable", lambda *_, **__: False)
    logits, source, grown = run()
    asked: list[bool] = []

    def anywhere(*tensors: torch.Tensor, backward: bool = False) -> bool:
        graded = torch.is_grad_enabled() and not backward
        asked.append(not any(graded and tensor.requires_grad for tensor in tensors))
        return asked[-1]

    monkeypatch.setattr(kernels, "usable", anywhere)
    by_kernels, followed, gradients = run()
    assert any(asked)
    assert torch.equal(followed, source)
    torch.testing.assert_close(by_kernels, logits)
    if gradients is not None and grown is not None:
        torch.testing.assert_close(gradients, grown, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_every_kernel_is_one_operator_for_the_compiler(device: str) -> None:
    """Schemas and the shapes that the compiler is told agree with what comes out."""
    pytest.importorskip("triton")
    from tokencut.ops.kernels import attention, clusters, matching, medoids, merging, rotation, sorting

    points, ones = torch.randn(2, 12, 8, device=device), torch.ones(2, 12, device=device)
    heads, bias = torch.randn(2, 3, 12, 16, device=device), torch.randn(2, 1, 1, 12, device=device)
    group = torch.arange(12, device=device).expand(2, -1) // 2

    def run() -> list[Any]:
        return [
            *clusters.density_average(points, ones, ones, 5, 1, 3, 0.5, -1.0, False, False),
            *clusters.density_average(points, ones, ones, 5, 2, 3, 0.5, 0.5, True, True),
            clusters.density_clusters(points, 5, ones, 1, 3, 0.5, -1.0, False),
            clusters.density_clusters(points, 5, None, 2, 3, 0.0, 0.5, True),
            *clusters.ordered_average(group, ones, ones, 6),
            merging.merge(points, 0, group, ones / 2, 6, True),
            *merging.merge_and_weigh(points, 0, group, ones / 2, ones[:, :6], True),
            merging.take(points, 1, group[:, ::2]),
            *matching.alternating_average(points, ones, 1, 4),
            *rotation.rotate(heads, heads, torch.ones(2, 1, 12, 32, device=device), 0, True),
            sorting.ranking(ones, True),
            sorting.highest(ones, 5),
            medoids.medoid_clusters(points, ones, 5, 2),
            attention.log_sizes(ones, 1, torch.bfloat16),
            attention.biased_attention(heads, heads, heads, bias),
            attention.class_attention(heads, heads, None, 1, 1),
            attention.class_attention(heads, heads, bias, 2, 0),
            *attention.keep_attended(heads, heads, bias, 1, points, 1, 5),
        ]

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)()
    for got, expected in zip(compiled, run(), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
        torch.testing.assert_close(got, expected)
