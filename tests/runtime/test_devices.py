"""Devices, precisions, and models left as they were found."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import tokencut
from tokencut.errors import UsageError
from tokencut.runtime import devices as runtime
from tokencut.runtime.devices import (
    autocast,
    describe_device,
    inference_state,
    precision_dtype,
    resolve_device,
    versions,
)

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *devices: str) -> None:
    """Has the machine seem to have these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda:0" in devices)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: sum(name.startswith("cuda") for name in devices))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in devices)


@pytest.mark.parametrize(
    ("devices", "name", "expected"),
    [
        (("cpu",), "auto", "cpu"),
        (("cpu", "mps"), "auto", "mps"),
        (("cpu", "cuda:0", "cuda:1"), "auto", "cuda"),
        (("cpu", "cuda:0", "cuda:1"), "cuda", "cuda"),
        (("cpu", "cuda:0", "cuda:1"), "cuda:1", "cuda:1"),
        (("cpu", "cuda:0"), "cpu", "cpu"),
        (("cpu", "mps"), "mps", "mps"),
    ],
)
def test_devices_by_name(monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], name: str, expected: str) -> None:
    pretend(monkeypatch, *devices)
    assert resolve_device(name) == torch.device(expected)
    assert resolve_device(torch.device(expected)) == torch.device(expected)


@pytest.mark.parametrize(
    ("devices", "name", "message"),
    [
        (("cpu",), "cuda", "there is no device 'cuda', this machine has cpu; type `device='cpu'`"),
        (("cpu",), "mps", "there is no device 'mps', this machine has cpu; type `device='cpu'`"),
        (
            ("cpu", "cuda:0"),
            "cuda:1",
            "there is no device 'cuda:1', this machine has cpu, cuda:0; type `device='cuda:0'`",
        ),
        (("cpu",), "gpu", "unknown device 'gpu', expected auto, cpu, cuda, cuda:N or mps; type `device='auto'`"),
        (("cpu",), "cuda:x", "unknown device 'cuda:x', expected auto, cpu, cuda, cuda:N or mps; type `device='auto'`"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], name: str, message: str
) -> None:
    pretend(monkeypatch, *devices)
    with pytest.raises(UsageError) as caught:
        resolve_device(name)
    assert str(caught.value) == message


def test_a_processor_is_described_with_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_processor_name", lambda: "Fast 3000")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert describe_device(CPU) == "Fast 3000, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert describe_device(CPU) == "Fast 3000, 8 threads"
    assert describe_device(torch.device("mps")) == "mps of Fast 3000, 8 threads"


def test_processor_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor : 0\nmodel name\t: Fast  3000 @ 2GHz\n")
    assert runtime._processor_name() == "Fast 3000 @ 2GHz"
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout="Fruit M9\n"))
    assert runtime._processor_name() == "Fruit M9"
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert runtime._processor_name() == "riscv64"


@pytest.mark.gpu
def test_a_gpu_is_described_by_its_name() -> None:
    assert describe_device(torch.device("cuda")) == torch.cuda.get_device_name(0)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_computes_in_a_precision(precision: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast(CPU, precision):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_what_a_precision_casts_to() -> None:
    assert [precision_dtype(name) for name in ("fp32", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("refuse", [precision_dtype, lambda precision: autocast(CPU, precision)])
def test_an_unknown_precision_is_refused(refuse: Callable[[str], object]) -> None:
    with pytest.raises(UsageError) as caught:
        refuse("fp8")
    assert str(caught.value) == "unknown precision 'fp8', expected fp32, bf16 or fp16; type `precision='bf16'`"


def snapshot(model: nn.Module) -> list[tuple[object, ...]]:
    """What must not change: the very tensors, where they lie, their gradients, and the modes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state: list[tuple[object, ...]] = [
        (name, id(tensor), tensor.data_ptr(), tensor.device, tensor.dtype, tensor.requires_grad, id(tensor.grad))
        for name, tensor in tensors
    ]
    state += [(name, value.grad.data_ptr()) for name, value in model.named_parameters() if value.grad is not None]
    return state + [(name, module.training) for name, module in model.named_modules()]


def found_model() -> nn.Module:
    """A model in the midst of training: partly frozen, with gradients and buffers."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    model[0].requires_grad_(False).eval()
    model(torch.randn(2, 3)).sum().backward()
    return model


def test_a_model_is_left_as_it_was() -> None:
    model = found_model()
    before = snapshot(model)
    with inference_state(model, CPU) as prepared:
        assert prepared is model
        assert not any(module.training for module in model.modules())
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_was_cast_is_left_as_it_was(dtype: torch.dtype) -> None:
    model = found_model()
    before, values = snapshot(model), [value.clone() for value in model.state_dict().values()]
    with inference_state(model, CPU, dtype):
        assert {value.dtype for value in model.parameters()} == {dtype}
        assert {value.dtype for value in model.buffers()} == {dtype, torch.int64}  # a counter stays whole
    assert snapshot(model) == before
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), values, strict=True))


def test_a_model_is_left_as_it_was_after_an_error() -> None:
    model = found_model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), inference_state(model, CPU):
        raise KeyboardInterrupt
    assert snapshot(model) == before


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model_comes_back_from_another_device(device: str) -> None:
    model = found_model()
    before = snapshot(model)
    with inference_state(model, torch.device(device)):
        assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {device}
    assert snapshot(model) == before


def test_versions_are_of_what_results_depend_on() -> None:
    assert versions() == {"torch": torch.__version__, "timm": timm.__version__, "tokencut": tokencut.__version__}
