"""torch.compile: one graph for every method and every kind of block, the same logits, and one size of batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_files import write_folder
from observing import Seen
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from tokencut.errors import ModelError, UsageError
from tokencut.evaluation.accuracy import evaluate
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress
from tokencut.profiling.measuring import profile
from tokencut.runtime.compiling import compile_calls, compile_model, in_batches, many_compiled

# For each family one name of each kind of block, attention, prefix and pooling, beside test_vit, which every method is
# tried on; all of two blocks.
NARROW: dict[str, Any] = {"embed_dim": 48, "num_heads": 3}
# Each kind of block of a plain ViT; tests/adapters/test_families.py has the other families.
BLOCKS: dict[str, dict[str, Any]] = {
    "test_vit2": {},
    "test_vit3": {},
    "deit_tiny_distilled_patch16_224": NARROW,
    "vit_base_patch16_xp_224": NARROW,
    "vit_dpwee_patch16_reg1_gap_256": NARROW,
    "vit_dlittle_patch16_reg1_gap_256": NARROW,
    "vit_base_patch16_18x2_224": NARROW,
    "vit_base_patch16_rpn_224": NARROW,
}


def small(name: str = "test_vit", method: str = "bat", prop_attn: bool = True, **options: Any) -> CompressedModel:
    """Two blocks, of which the first reduces 16 image tokens to 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=64, num_classes=5, **{"depth": 2, **options})
    return compress(model, keep=0.5, layers=(1,), method=method, prop_attn=prop_attn).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def captured(model: nn.Module, pixels: Tensor) -> Tensor:
    """What one graph gives, or an error where there is more than one."""
    torch._dynamo.reset()
    with torch.no_grad():
        logits: Tensor = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)(pixels)
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(methods(keeps_grid=False)))
def test_every_method_is_one_graph(method: str) -> None:
    model = small(method=method)
    with torch.no_grad():
        torch.testing.assert_close(captured(model, images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), BLOCKS.items(), ids=BLOCKS)
def test_every_kind_of_block_is_one_graph(name: str, options: dict[str, Any]) -> None:
    model = small(name, "evit", **options)  # reads class attention, and merges, so that later blocks have a bias
    with torch.no_grad():
        torch.testing.assert_close(captured(model, images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_one_graph(precision: torch.dtype) -> None:
    model = small()
    with torch.autocast("cpu", dtype=precision), torch.no_grad():
        torch.testing.assert_close(captured(model, images()), model(images()), rtol=0.1, atol=1e-3)


@pytest.mark.slow
def test_any_batch_is_one_graph() -> None:
    """The graph does not hold the number of images, so a batch of another size needs no other one."""
    model, runs = small(), []

    def counting(graph: nn.Module, inputs: list[Tensor]) -> nn.Module:
        runs.append(len(inputs))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
        for batch in (4, 3, 7):
            torch.testing.assert_close(compiled(images(batch)), model(images(batch)))
    assert len(runs) == 1


@pytest.mark.slow
def test_kernels_give_the_same_logits() -> None:
    """Inductor, on the smallest model: every kernel takes a second of C++ compiler."""
    model = small(depth=1, embed_dim=16, num_heads=1)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(compile_model(model)(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_an_unknown_mode() -> None:
    with pytest.raises(
        UsageError,
        match="^unknown compile mode 'fast', expected one of default, reduce-overhead, max-autotune; "
        "type `compile_mode='default'`$",
    ):
        compile_model(small(), "fast")


def test_what_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pixels: Tensor) -> Tensor:
        raise TorchDynamoException("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda model, **_: fail)
    with pytest.raises(
        ModelError,
        match=r"^torch.compile failed \(No working C\+\+ compiler found\); it needs a C\+\+ compiler on a CPU and "
        "Triton on a GPU: install that, or leave out `compile_mode`$",
    ):
        compile_model(small())(images())


def test_parts_are_compiled_whole_or_not_at_all() -> None:
    def broken() -> Tensor:
        torch._dynamo.graph_break()
        return torch.ones(1)

    with pytest.raises(ModelError, match=r"^torch.compile failed \(.*or leave out `compile_mode`$"):
        compile_calls({"broken": broken})


def test_each_part_is_compiled_and_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def compiled(call: Any, *, fullgraph: bool, dynamic: bool, mode: str) -> Any:
        assert (fullgraph, dynamic, mode) == (True, False, "max-autotune-no-cudagraphs")
        return lambda: called.append(f"{call()} without gradients: {not torch.is_grad_enabled()}")

    monkeypatch.setattr(torch, "compile", compiled)
    seen = Seen()
    made = compile_calls({"one": lambda: 1, "two": lambda: 2}, "max-autotune-no-cudagraphs", seen)
    assert [(now.done, now.total) for now in seen.told] == [(1, 2), (2, 2)]
    assert (list(made), called) == (["one", "two"], ["1 without gradients: True", "2 without gradients: True"])


@torch._dynamo.config.patch(recompile_limit=8)
def test_one_function_is_compiled_for_many_models() -> None:
    torch._dynamo.reset()
    limit, graphs = torch._dynamo.config.recompile_limit, []  # what other tests import may have raised it

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def part(size: int) -> Any:
        return torch.compile(lambda: torch.ones(size) + size, backend=counting, fullgraph=True, dynamic=False)

    with many_compiled():
        assert [float(part(size)()[0]) for size in range(1, limit + 3)] == [size + 1 for size in range(1, limit + 3)]
    assert len(graphs) == limit + 2
    assert torch._dynamo.config.recompile_limit == limit


def test_timms_own_models_may_have_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = []
    monkeypatch.setattr(torch, "compile", lambda model, *, fullgraph, **_: whole.append(fullgraph))
    compile_model(small())
    compile_model(small().model)
    assert whole == [True, False]


@pytest.mark.parametrize("count", [1, 3, 4, 8, 9])
def test_batches_of_one_size(count: int) -> None:
    sizes = []

    def forward(pixels: Tensor) -> Tensor:
        sizes.append(pixels.shape[0])
        return pixels[:, :, 5, 7]

    pixels = images(count)
    assert torch.equal(in_batches(forward, pixels, 4), pixels[:, :, 5, 7])
    assert sizes == [4] * -(-count // 4)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes `torch.compile` quick: it captures and does not compile. Holds the batch sizes it met."""
    met: list[int] = []
    compiler = torch.compile

    def capture(model: nn.Module, *, fullgraph: bool, dynamic: bool, mode: str) -> Any:
        assert mode == "default"
        forward = compiler(model, backend="eager", fullgraph=fullgraph, dynamic=dynamic)

        def run(pixels: Tensor) -> Tensor:
            met.append(pixels.shape[0])
            logits: Tensor = forward(pixels)
            return logits

        return run

    monkeypatch.setattr(torch, "compile", capture)
    torch._dynamo.reset()
    return met


def test_an_evaluation_compiles_for_one_batch_size(sizes: list[int], tmp_path: Path) -> None:
    model, folder = small(), write_folder(tmp_path / "set", [f"c{number}" for number in range(5)], 2)
    before = evaluate(model, folder, batch_size=4, workers=0, device="cpu")
    after = evaluate(model, folder, batch_size=4, workers=0, device="cpu", compile_mode="default")
    assert (after.top1, after.images) == (before.top1, before.images) == (before.top1, 10)
    assert after.loss == pytest.approx(before.loss, rel=1e-6)
    assert sizes == [4, 4, 4]


@pytest.mark.slow
def test_a_profile_times_both_sides_compiled(sizes: list[int]) -> None:
    report = profile(small(), device="cpu", batch_size=2, rounds=3, compile_mode="default")
    assert set(sizes) == {2}
    values = report.to_dict()
    assert (values["compile_mode"], values["stage_share"]) == ("default", None)
    assert report.speedup is not None
    assert report.dense.latency_ms
    assert "compile_mode" not in profile(small(), latency=False, compile_mode="default").to_dict()


def test_a_dense_model_is_compiled_too(sizes: list[int]) -> None:
    report = profile(small().model, device="cpu", batch_size=2, rounds=3, compile_mode="default")
    assert (report.speedup, report.stage_share, report.compile_mode) == (1.0, None, "default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # a compiler's own warnings are none of ours
@pytest.mark.parametrize("method", sorted(methods(keeps_grid=False)))
def test_cuda_graphs(method: str) -> None:
    model, pixels = small(method=method).cuda(), images().cuda()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = compile_model(model, "reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            logits = forward(pixels).clone()
        torch.testing.assert_close(logits, model(pixels), rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
