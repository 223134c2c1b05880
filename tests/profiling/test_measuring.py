"""What counts as a multiply-add, that nothing else is passed over without a word, and what a report says."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from observing import Seen
from torch import Tensor, nn

from tokencut.cost import BlockRow, total
from tokencut.errors import TokencutError, UsageError
from tokencut.model import CompressedModel, compress
from tokencut.profiling import counting, measuring
from tokencut.profiling.counting import COUNTED, MOVES, UNCOUNTED, MacCount, count_macs
from tokencut.profiling.latency import Timing
from tokencut.profiling.measuring import ProfileReport, profile, time_notes
from tokencut.runtime.capturing import capture

CONTRACT = ["model", "method", "keep", "dense", "compressed", "flops_reduction", "speedup", "stages", "device",
            "precision", "batch_size", "versions"]  # fmt: skip


def small(name: str = "test_vit", depth: int = 3, **arguments: Any) -> nn.Module:
    return timm.create_model(name, img_size=64, num_classes=5, depth=depth, **arguments)


class Does(nn.Module):
    """A model that runs one function on `(1, 2, 3, 4)` numbers, a batch of `(2, 3, 4)`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def count(function: Callable[[Tensor], Tensor]) -> MacCount:
    return count_macs(Does(function), (2, 3, 4))


@pytest.mark.parametrize(
    ("function", "by_hand"),
    [
        (lambda x: F.linear(x, x.new_zeros(7, 4)), 2 * 3 * 7 * 4),
        (lambda x: x @ x.transpose(2, 3), 2 * 3 * 3 * 4),
        (lambda x: x.new_zeros(5, 1, 7, 3) @ x, 5 * 2 * 7 * 4 * 3),  # both operands broadcast
        (lambda x: x[0, 0] @ x.new_zeros(5, 4, 7), 5 * 3 * 7 * 4),
        (lambda x: x @ x.new_zeros(4), 2 * 3 * 4),
        (lambda x: torch.mm(x[0, 0], x.new_zeros(4, 7)), 3 * 7 * 4),
        (lambda x: torch.bmm(x[0], x[0].transpose(1, 2)), 2 * 3 * 3 * 4),
        (lambda x: torch.mv(x[0, 0], x[0, 0, 0]), 3 * 4),
        (lambda x: torch.dot(x[0, 0, 0], x[0, 0, 1]), 4),
        (lambda x: torch.addmm(x.new_zeros(7), x[0, 0], x.new_zeros(4, 7)), 3 * 7 * 4),
        (lambda x: torch.addmv(x.new_zeros(3), x[0, 0], x[0, 0, 0]), 3 * 4),
        (lambda x: torch.baddbmm(x.new_zeros(1), x[0], x[0].transpose(1, 2)), 2 * 3 * 3 * 4),
        (lambda x: torch.addbmm(x.new_zeros(1), x[0], x[0].transpose(1, 2)), 2 * 3 * 3 * 4),
        (lambda x: F.scaled_dot_product_attention(x, x.new_zeros(1, 2, 5, 4), x.new_zeros(1, 2, 5, 7)),
         2 * 3 * 5 * (4 + 7)),
        (lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x.new_zeros(1, 1, 1, 3)), 2 * 3 * 3 * (4 + 4)),
    ],
)  # fmt: skip
def test_a_product_by_hand(function: Callable[[Tensor], Tensor], by_hand: int) -> None:
    counted = count(function)
    assert (counted.total, dict(counted.uncounted)) == (by_hand, {})


@pytest.mark.parametrize(
    ("layer", "by_hand"),
    [
        (nn.Conv2d(2, 6, 2), 6 * (2 * 3) * 2 * (2 * 2)),
        (nn.Conv2d(2, 6, 2, groups=2, bias=False), 6 * (2 * 3) * 1 * (2 * 2)),
        (nn.Conv2d(2, 6, 2, stride=2, padding=1), 6 * (2 * 3) * 2 * (2 * 2)),
        (nn.ConvTranspose2d(2, 6, 2, stride=2), (2 * 3 * 4) * 6 * (2 * 2)),
        (nn.Sequential(nn.Conv2d(2, 6, 1), nn.GELU(), nn.Conv2d(6, 1, 1)), 6 * 12 * 2 + 12 * 6),
    ],
)
def test_a_convolution_by_hand(layer: nn.Module, by_hand: int) -> None:
    assert count_macs(layer, (2, 3, 4)).total == by_hand


def test_norms_softmax_and_sorting_are_named_not_counted() -> None:
    counted = count(lambda x: F.layer_norm(x.relu_(), [4]).softmax(-1).sort().values.gather(3, x.argmax(3, True)) + 1)
    assert counted.total == 0
    assert dict(counted.uncounted) == {}
    assert counted.ignored == {
        "activations": ("relu",),
        "element by element": ("add",),
        "gathers and scatters": ("gather",),
        "norms": ("layer_norm",),
        "softmax": ("softmax",),
        "sorting and extremes": ("argmax", "sort"),
    }


def test_an_operator_without_a_handle_is_reported() -> None:
    counted = count(lambda x: torch.cdist(x, x) + torch.cdist(x, x).square())
    assert (counted.total, dict(counted.uncounted)) == (0, {"aten::cdist": 2})


def test_no_operator_stands_in_two_lists() -> None:
    assert not set(COUNTED) & set(UNCOUNTED)
    assert not set(COUNTED) & MOVES
    assert not set(UNCOUNTED) & MOVES


def test_count_by_module() -> None:
    counted = count_macs(small(), (3, 64, 64))
    tokens, width = 17, 64
    assert counted.by_module["blocks.0.attn.qkv"] == tokens * width * 3 * width
    assert counted.by_module["head"] == width * 5
    assert counted.by_module[""] == counted.total


def test_an_operator_that_meta_cannot_run_is_traced_for_real() -> None:
    table = torch.zeros(4, 7)  # no buffer, so it stays on the CPU when the copy goes to the meta device
    assert count(lambda x: x @ table).total == 2 * 3 * 7 * 4


def test_counting_leaves_the_model_alone() -> None:
    model = small()
    before = {name: (id(weight), weight._version) for name, weight in model.state_dict(keep_vars=True).items()}
    count_macs(model, (3, 64, 64))
    assert model.training
    assert {name: (id(w), w._version) for name, w in model.state_dict(keep_vars=True).items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_fvcores_own_warnings_are_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh import, under `-W error`: nothing escapes, and afterwards such a warning is an error again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fvcore"]:
        monkeypatch.delitem(sys.modules, name)
    filters = list(warnings.filters)
    counting._flop_count_analysis()
    assert list(warnings.filters) == filters


def test_report_without_latency_has_the_contracts_keys() -> None:
    model = compress(small(depth=6), keep=0.5)
    values = profile(model, latency=False, device="cpu").to_dict()
    assert list(values)[: len(CONTRACT)] == CONTRACT
    assert set(values) - set(CONTRACT) == {"uncounted", "notes"}
    assert set(values["dense"]) == set(values["compressed"]) == {"gmacs", "params"}
    assert values["speedup"] is None
    assert values["stages"] == [
        {"block": 2, "tokens_in": 16, "tokens_out": 8},
        {"block": 4, "tokens_in": 8, "tokens_out": 4},
        {"block": 5, "tokens_in": 4, "tokens_out": 2},
    ]
    reduction = 1 - values["compressed"]["gmacs"] / values["dense"]["gmacs"]
    assert values["flops_reduction"] == pytest.approx(reduction, rel=1e-12)
    assert set(values["versions"]) == {"torch", "timm", "tokencut"}
    assert (values["method"], values["keep"], values["batch_size"]) == ("bat", 0.5, 16)
    assert (values["uncounted"], values["notes"]) == ({}, [])
    assert json.loads(json.dumps(values)) == values


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_is_profiled(channels: int) -> None:
    report = profile(compress(small(in_chans=channels), keep=0.5), rounds=3, batch_size=1, device="cpu")
    assert report.compressed.latency_ms is not None
    patches = 64 * 16 * 16 * 16 / 1e9  # width, patches, and the pixels of one
    colour = profile(compress(small(), keep=0.5), latency=False)
    assert report.dense.gmacs - colour.dense.gmacs == pytest.approx((channels - 3) * patches)


def test_report_with_latency_adds_times() -> None:
    seen = Seen()
    report = profile(compress(small(), keep=0.5), batch_size=2, device="cpu", rounds=3,
                     observer=seen)  # fmt: skip
    values = report.to_dict()
    assert list(values)[: len(CONTRACT)] == CONTRACT
    assert set(values) - set(CONTRACT) == {
        "speedup_spread", "stage_share", "compile_mode", "captured", "launch_bound", "uncounted", "notes",
    }  # fmt: skip
    assert (report.captured, report.launch_bound) == (False, None)
    for side in (report.dense, report.compressed):
        assert side.latency_ms is not None
        assert side.images_per_second == pytest.approx(2 / side.latency_ms * 1000)
    timed = {"latency_ms", "images_per_second", "latency_spread_ms", "peak_memory_mib"}
    assert set(values["dense"]) == {"gmacs", "params"} | timed
    assert values["speedup"] == values["dense"]["latency_ms"] / values["compressed"]["latency_ms"]
    assert report.stage_share is not None
    assert 0 < report.stage_share < 1
    assert seen.told == [(f"timing {report.model}", done, 3, {}) for done in (1, 2, 3)]
    assert "thread" in report.device
    assert json.loads(json.dumps(values)) == values


def test_blocks_add_up_to_the_total() -> None:
    model = compress(small("test_vit2"), keep=0.5)
    report = profile(model, latency=False, device="cpu")
    values = report.to_dict(by_block=True)
    assert [row["block"] for row in values["blocks"]] == ["embedding", 1, 2, 3, "head"]
    assert sum(row["macs"] for row in values["blocks"]) == total(report.blocks)
    assert total(report.blocks) / 1e9 == report.compressed.gmacs
    reducing = {row["block"]: row for row in values["blocks"] if row["stage_macs"]}
    assert [(block, row["tokens_in"], row["tokens_out"]) for block, row in reducing.items()] == [
        (stage["block"], stage["tokens_in"], stage["tokens_out"]) for stage in values["stages"]
    ]
    assert "layer_norm" in values["not_counted"]["norms"]
    assert "sort" in values["not_counted"]["sorting and extremes"]


@pytest.mark.parametrize(("name", "rows"), [("test_vit", 8), ("test_resnet", 0)])
def test_a_plain_model_is_dense_and_compressed_at_once(name: str, rows: int) -> None:
    model = timm.create_model(name, num_classes=5)
    report = profile(model, latency=False, device="cpu")
    assert report.dense == report.compressed
    assert (report.method, report.keep, report.stages, report.flops_reduction) == (None, 1.0, (), 0.0)
    assert len(report.blocks) == rows
    assert report.dense.gmacs > 0


def test_a_plain_model_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, dense=(2.0, 2.0, 2.0))
    report = profile(small(), batch_size=4, device="cpu")
    assert report.dense == report.compressed
    assert (report.dense.latency_ms, report.speedup, report.stage_share) == (2000.0, 1.0, 0.0)
    assert report.notes == ()


def test_recipes_with_several_keeps_or_none() -> None:
    assert profile(compress(small(), keep=[0.9, 0.7, 0.5]), latency=False).keep == [0.9, 0.7, 0.5]
    assert profile(compress(small(), reduce_by=2), latency=False).keep is None


@pytest.mark.parametrize(("given", "name"), [(None, "test_vit.r160_in1k"), ("mine.safetensors", "mine.safetensors")])
def test_name_of_the_model(given: str | None, name: str) -> None:
    assert profile(small(), latency=False, name=given).model == name


def pretend(monkeypatch: pytest.MonkeyPatch, **samples: tuple[float, ...]) -> None:
    """Has the timing give seconds that are made up, for a batch of 4."""

    def measured(models: Mapping[str, Any], images: Tensor, **settings: Any) -> dict[str, Timing]:
        assert list(models) == list(samples)
        return {
            name: Timing(1000 * sorted(s)[1], (1000 * min(s), 1000 * max(s)), 4 / sorted(s)[1], samples=s)
            for name, s in samples.items()
        }

    monkeypatch.setattr(measuring, "measure", measured)


TINY = (
    "at 0.00299 GMACs an image much of its time does not depend on tokens; in a model of 4.6 it falls with them, as "
    "tokencut profile deit_small shows"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compressed", "note"),
    [
        ((1.0, 1.0, 1.0), None),
        ((1.98, 1.98, 1.98), f"no speed-up on this machine: compressed is 1.01 times as fast as dense; {TINY}"),
        ((2.5, 2.5, 2.5), f"no speed-up on this machine: compressed is 0.80 times as fast as dense; {TINY}"),
        ((0.8, 1.0, 1.1), "times differ by 30% from round to round, so this machine has other work; "
                          "run it again when it is quiet"),
    ],
)  # fmt: skip
def test_what_the_notes_say_of_the_speed(
    monkeypatch: pytest.MonkeyPatch, compressed: tuple[float, ...], note: str | None
) -> None:
    pretend(monkeypatch, dense=(2.0, 2.0, 2.0), compressed=compressed)
    report = profile(compress(small(), keep=0.5), batch_size=4, device="cpu")
    assert report.speedup == 2.0 / compressed[1]
    assert report.notes == (() if note is None else (note,))


def test_no_word_of_speed_where_nothing_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, dense=(2.0, 2.0, 2.0), compressed=(2.0, 2.0, 2.0))
    assert profile(compress(small(), keep=1.0), batch_size=4, device="cpu").notes == ()


def test_operators_without_a_handle_are_a_note() -> None:
    class Odd(type(small())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return torch.cdist(y, y)

    model = small()
    model.__class__ = Odd
    report = profile(model, latency=False)
    assert report.notes == ("the multiply-adds leave out operators that tokencut has no count for: 1 x aten::cdist",)
    assert report.uncounted == {"aten::cdist": 1}


def test_a_closed_form_that_disagrees_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress(small(), keep=0.5)
    counted = round(1e9 * profile(model, latency=False).compressed.gmacs)
    monkeypatch.setattr(measuring, "predicted_macs", lambda model: (BlockRow(1, 16, 16, 12345, 0),))
    assert profile(model, latency=False).notes == (
        f"the closed form gives 12345 multiply-adds where the trace has {counted}; "
        "please report the model's name and options",
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_profiling_leaves_the_model_as_it_was(precision: str) -> None:
    model = compress(small(), keep=0.5).train()
    model.model.get_submodule("blocks.1").eval()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    profile(model, batch_size=1, device="cpu", rounds=3, precision=precision)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is not None for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_half_precision_halves_the_memory() -> None:
    model = compress(small(), keep=0.5)
    full, half = (profile(model, batch_size=1, device="cpu", rounds=3, precision=name) for name in ("fp32", "bf16"))
    assert full.dense.peak_memory_mib is not None and half.dense.peak_memory_mib is not None
    # Weights and features in two bytes instead of four; some sums inside operators stay in fp32.
    assert 0.45 < half.dense.peak_memory_mib / full.dense.peak_memory_mib < 0.6


def test_a_model_in_half_precision_gets_such_images() -> None:
    report = profile(compress(small().bfloat16(), keep=0.5), batch_size=1, device="cpu", rounds=3)
    assert report.compressed.latency_ms is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size=0` is not a whole number from 1 to 65536; type `batch_size=64`"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"device": "tpu"}, "'tpu'"),
        ({"rounds": 1}, "`rounds=1` is not a whole number from 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        profile(compress(small(), keep=0.5), **{"device": "cpu", "batch_size": 1, **arguments})


@pytest.mark.parametrize(
    ("error", "batch_size", "message"),
    [
        (torch.cuda.OutOfMemoryError("no room"), 64,
         "a batch of 64 images does not fit into the memory of cpu; type `batch_size=32`"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1,
         "a batch of 1 image does not fit into the memory of cpu; take a smaller model or `device='cpu'`"),
    ],
)  # fmt: skip
def test_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, error: Exception, batch_size: int, message: str
) -> None:  # fmt: skip
    def measured(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(measuring, "measure", measured)
    with pytest.raises(TokencutError, match=f"^{message}$"):
        profile(small(), batch_size=batch_size, device="cpu")


def test_another_runtime_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(measuring, "measure", measured)
    with pytest.raises(RuntimeError, match="something else"):
        profile(small(), device="cpu")


def timing(seconds: float) -> Timing:
    return Timing(1000 * seconds, (1000 * seconds, 1000 * seconds), 4 / seconds, samples=(seconds,) * 3)


LAUNCHES = ("launch-bound: the GPU works 500.00 of 2000.00 ms a batch, and else waits for kernels to be started; "
            "type `capture=True` for CUDA graphs")  # fmt: skip
COMPUTES = "compute-bound: the GPU works all the time, which "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replayed", "keep", "precision", "bound", "note"),
    [
        ({"dense": 0.75, "compressed": 0.5}, 0.5, "fp32", True,
         f"{LAUNCHES} (1.50 times as fast as dense), or a larger `batch_size`"),
        ({"dense": 0.5, "compressed": 0.5}, 1.0, "bf16", True, f"{LAUNCHES}, or a larger `batch_size`"),
        ({"dense": 1.85, "compressed": 1.81}, 0.5, "fp32", False,
         f"{COMPUTES}a lower `keep` or `precision='bf16'` shortens, and `capture` would not"),
        ({"dense": 1.9, "compressed": 2.1}, 0.5, "bf16", False,
         f"{COMPUTES}a lower `keep` or `compile_mode='default'` shortens, and `capture` would not"),
        ({}, 0.5, "fp32", None, None),
    ],
)  # fmt: skip
def test_what_holds_a_gpu_up(
    monkeypatch: pytest.MonkeyPatch, replayed: dict[str, float], keep: float, precision: str, bound: bool | None,
    note: str | None,
) -> None:  # fmt: skip
    pretend(monkeypatch, dense=(3.0, 3.0, 3.0), compressed=(2.0, 2.0, 2.0))
    found = {name: timing(seconds) for name, seconds in replayed.items()}
    monkeypatch.setattr(measuring, "_replayed", lambda *arguments: found)
    report = profile(compress(small(), keep=keep), batch_size=4, device="cpu", precision=precision)
    assert (report.launch_bound, report.notes) == (bound, () if note is None else (note,))
    values = report.to_dict()
    for side in ("dense", "compressed"):
        assert values[side].get("captured_ms") == (1000 * replayed[side] if replayed else None)


def test_what_holds_a_gpu_up_in_a_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, dense=(2.0, 2.0, 2.0))
    for replayed, note in (
        (0.5, f"{LAUNCHES}, or a larger `batch_size`"),
        (1.9, f"{COMPUTES}`tokencut.compress(model)` or `precision='bf16'` shortens, and `capture` would not"),
    ):
        monkeypatch.setattr(measuring, "_replayed", lambda *_, seconds=replayed: {"dense": timing(seconds)})
        assert profile(small(), batch_size=4, device="cpu").notes == (note,)


def test_nothing_is_captured_on_a_cpu() -> None:
    model = compress(small(), keep=0.5)
    report = profile(model, batch_size=1, device="cpu", rounds=3, capture=True)
    assert (report.captured, report.launch_bound) == (False, None)
    assert report.notes[0] == "images on cpu are not captured: CUDA graphs need an NVIDIA GPU"
    assert report.stage_share is not None and report.dense.peak_memory_mib is not None


def test_both_sides_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, dense=(2.0, 2.0, 2.0), compressed=(1.0, 1.0, 1.0))
    asked: list[tuple[str, ...]] = []

    def captured(sides: Mapping[str, nn.Module], images: Tensor) -> tuple[Mapping[str, nn.Module], tuple[str, ...]]:
        asked.append(tuple(sides))
        return sides, ()

    monkeypatch.setattr(measuring, "_captured", captured)
    report = profile(compress(small(), keep=0.5), batch_size=4, device="cpu", capture=True)
    assert asked == [("dense", "compressed")]
    assert (report.captured, report.stage_share, report.launch_bound, report.notes) == (True, None, None, ())


def test_of_two_sides_both_are_captured_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = (compress(small(), keep=0.5) for _ in range(2))
    monkeypatch.setattr(measuring.CapturedModel, "record", lambda graph, images: graph.model is dense)
    monkeypatch.setattr(measuring.CapturedModel, "notes", ("cannot be",))
    images = torch.zeros(1, 3, 64, 64)
    assert list(measuring._captured({"dense": dense}, images)[0]) == ["dense"]
    assert measuring._captured({"dense": dense, "compressed": model}, images) == ({}, ("cannot be",))


def test_what_is_captured_already_is_refused() -> None:
    with pytest.raises(UsageError, match="^profile times a captured model beside the captured dense one, so it "
                       "captures both; pass `model.model` and `capture=True`$"):  # fmt: skip
        profile(capture(compress(small()).eval(), torch.zeros(1, 3, 64, 64)))


@pytest.mark.gpu
def test_profile_of_graphs_on_a_gpu() -> None:
    model = compress(small(depth=12), keep=0.5)
    settings: dict[str, Any] = {"device": "cuda", "batch_size": 1, "rounds": 3}
    eager, captured = profile(model, **settings), profile(model, capture=True, **settings)
    assert (eager.captured, eager.launch_bound) == (False, True)
    assert (captured.captured, captured.launch_bound, captured.stage_share) == (True, None, None)
    assert (captured.dense.peak_memory_mib, captured.dense.captured_ms) == (None, None)
    assert eager.compressed.captured_ms is not None and captured.compressed.latency_ms is not None
    assert any(note.startswith("launch-bound: ") for note in eager.notes)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_profile_on_a_gpu(precision: str) -> None:
    model = compress(small(), keep=0.5)
    report = profile(model, device="cuda", precision=precision, rounds=3)
    assert isinstance(report, ProfileReport)
    assert report.dense.peak_memory_mib is not None
    assert report.device == torch.cuda.get_device_name()
    assert isinstance(model, CompressedModel)
    assert next(model.parameters()).device.type == "cpu"


def test_a_slow_large_model_is_not_called_small() -> None:
    slow = Timing(2.0, (2.0, 2.0), 2.0, samples=(2.0, 2.0, 2.0))
    plain = ("no speed-up on this machine: compressed is 0.80 times as fast as dense",)
    assert time_notes(0.8, slow, gmacs=4.6) == time_notes(0.8, slow) == plain


@pytest.mark.parametrize(
    ("name", "arguments", "note"),
    [("test_vit", {}, None), ("vit_small_patch16_dinov3", {}, None),
     ("beit_base_patch16_224", {}, "attention adds a bias for each pair of tokens, which flash attention does not"),
     ("beit_base_patch16_224", {"use_rel_pos_bias": False}, None),
     ("cait_xxs24_224", {}, "attention holds the weights of all pairs of tokens in memory, since heads are mixed")],
)  # fmt: skip
def test_what_keeps_a_gpu_from_its_fastest_attention_is_told(
    name: str, arguments: dict[str, Any], note: str | None
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=1, **arguments)
    told = measuring.attention_notes(model, torch.device("cuda"))
    assert measuring.attention_notes(model, torch.device("cpu")) == ()
    assert [line.startswith(note or "") for line in told] == [True] * (note is not None)
