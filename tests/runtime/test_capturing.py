"""CUDA graphs: where there can be none the model is called and one note says why; on a GPU replays give its output."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from observing import Seen
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokencut
from tokencut.data.sources import Source
from tokencut.errors import UsageError
from tokencut.methods import methods
from tokencut.model import CompressedModel, compress
from tokencut.models.loading import load_model
from tokencut.runtime import capturing
from tokencut.runtime.capturing import CapturedModel, capture

NO_GPU = "images on cpu are not captured: CUDA graphs need an NVIDIA GPU"


def small(method: str = "bat", name: str = "test_vit", **options: Any) -> CompressedModel:
    """Three blocks, of which the second reduces 16 image tokens to 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=64, num_classes=5, **{"depth": 3, **options})
    return compress(model, keep=0.5, layers=(2,), method=method).eval()


def images(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


class Part(nn.Module):
    """Something to watch: two layers, one of them normalised with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.eval()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.norm(self.first(x)) * scale
        return out


def test_without_a_gpu_the_model_is_called_and_one_note_says_so() -> None:
    model, seen = small(), Seen()
    fast = capture(model, images(), observer=seen)
    with torch.no_grad():
        for batch in (2, 3):
            assert torch.equal(fast(images(batch)), model(images(batch)))
    assert seen.notes == [NO_GPU]
    assert (fast.notes, fast.graphs, fast.record(images())) == ((NO_GPU,), 0, False)


def test_notes_that_nobody_takes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tokencut")
    capture(Part(), torch.zeros(2, 3))(torch.zeros(2, 3))
    assert caplog.messages == [NO_GPU]


def test_gradients_flow_through_the_model() -> None:
    part = Part()
    capture(part, torch.zeros(2, 3))(torch.ones(2, 3)).sum().backward()
    assert part.first.weight.grad is not None


def test_more_arguments_reach_the_model() -> None:
    fast = CapturedModel(Part())
    x = torch.ones(2, 3)
    assert torch.equal(fast(x, scale=2.0), 2 * fast(x))
    assert fast.notes == ("calls with more arguments than the images are not captured; leave them out", NO_GPU)


def test_the_models_attributes_are_there() -> None:
    model = small()
    fast = capture(model, images())
    assert fast.model is model
    assert (fast.num_classes, fast.recipe, fast.pretrained_cfg) == (5, model.recipe, model.pretrained_cfg)
    assert [*fast.parameters()] == [*model.parameters()]
    with pytest.raises(AttributeError, match="CompressedModel.*nothing"):
        _ = fast.nothing
    assert fast.train().model.training and fast.training
    assert not CapturedModel(Part()).training


def test_an_evaluation_takes_it(few: Source) -> None:
    model = tokencut.compress(load_model("digits").model, keep=0.6)
    settings: dict[str, Any] = {"device": "cpu", "workers": 0}
    fast, plain = (tokencut.evaluate(judged, few, **settings) for judged in (CapturedModel(model), model))
    assert (fast.correct, fast.model) == (plain.correct, plain.model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_captures_anew(copied: Callable[[nn.Module], CapturedModel]) -> None:
    fast = CapturedModel(Part(), max_graphs=3, copy=False, observer=Seen())
    other = copied(fast)
    assert (other.max_graphs, other.copy, other.graphs, type(other)) == (3, False, 0, CapturedModel)
    assert other.model is not fast.model and other._recorder.model is other.model
    assert torch.equal(other(torch.ones(2, 3)), fast(torch.ones(2, 3)))


@pytest.mark.slow
def test_torch_compile_traces_the_model_and_the_note_breaks_no_graph() -> None:
    seen = Seen()
    fast = CapturedModel(Part(), observer=seen)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.ones(2, 3)), fast.model(torch.ones(2, 3)))
    assert seen.notes == [
        "under torch.compile nothing is captured; compile the model alone, in mode 'reduce-overhead', which captures "
        "as well"
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_who_looks_at_operations_sees_them() -> None:
    fast = CapturedModel(Part())
    with FlopCounterMode(display=False) as counter:
        fast(torch.ones(2, 3))
    assert counter.get_total_flops() == 2 * 2 * 3 * 3
    with torch.no_grad():
        assert "linear" in str(torch.jit.trace(fast, torch.ones(2, 3), check_trace=False).inlined_graph)
    assert fast.notes == ()


def test_too_few_graphs() -> None:
    with pytest.raises(UsageError, match="^`max_graphs=0` is not a whole number from 1 to 1024; type `max_graphs=8`$"):
        capture(Part(), torch.zeros(2, 3), max_graphs=0)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda part: part.first.weight.data.mul_(2), True),
        (lambda part: part.load_state_dict(Part().state_dict()), True),
        (lambda part: part.to("cpu", torch.float32), True),
        (lambda part: part.half(), False),
        (lambda part: part.half().float(), False),
        (lambda part: setattr(part.first, "weight", nn.Parameter(part.first.weight.clone())), False),
        (lambda part: setattr(part.first, "bias", None), False),
        (lambda part: setattr(part.norm, "running_mean", torch.zeros(3)), False),
        (lambda part: part.load_state_dict(Part().state_dict(), assign=True), False),
        (lambda part: setattr(part, "first", nn.Identity()), False),
        (lambda part: part.add_module("second", nn.Identity()), False),
        (lambda part: delattr(part, "norm"), False),
    ],
)
def test_what_is_put_in_the_place_of_something_is_noticed(change: Callable[[Part], Any], same: bool) -> None:
    part = Part()
    watched = capturing._Watched(part)
    with torch.no_grad():
        change(part)
    assert watched.is_same() is same


def test_other_weights_never_lie_where_old_ones_were() -> None:
    """Memory that is free again is mostly given to the next that asks: 20 times the same size."""
    part = Part()
    watched = capturing._Watched(part)
    for _ in range(20):
        part.first.weight.data = torch.randn(3, 3)
        assert not watched.is_same()


class Quantised(Tensor):
    """Stands for tensors that hold others."""


TRAINING = "a model in training mode is not captured; call `model.eval()`"
GRADIENTS = "calls that ask for gradients are not captured; call the model under `torch.no_grad()`"
HOOKS = "a model with hooks on its modules is not captured, since a graph would not run them; remove them"


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (lambda part: part.requires_grad_(False), None),
        (lambda part: None, GRADIENTS),
        (lambda part: part.requires_grad_(False).norm.train(), TRAINING),
        (lambda part: part.requires_grad_(False).norm.register_forward_hook(lambda *_: None), HOOKS),
        (lambda part: part.requires_grad_(False).first.register_forward_pre_hook(lambda *_: None), HOOKS),
    ],
)
def test_obstacles(change: Callable[[Part], Any], obstacle: str | None) -> None:
    part = Part()
    change(part)
    watched = capturing._Watched(part)
    assert watched.obstacle(torch.zeros(2, 3)) == obstacle
    with torch.no_grad():
        assert watched.obstacle(torch.zeros(2, 3)) == (None if obstacle == GRADIENTS else obstacle)
    if obstacle is None:
        assert watched.obstacle(torch.zeros(2, 3, requires_grad=True)) == GRADIENTS


def test_hooks_on_all_modules_are_an_obstacle() -> None:
    watched = capturing._Watched(Part().requires_grad_(False))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert watched.obstacle(torch.zeros(2, 3)) == HOOKS
    finally:
        handle.remove()


def test_weights_of_another_class_are_an_obstacle() -> None:
    part = Part().requires_grad_(False)
    part.norm.running_mean = torch.zeros(3).as_subclass(Quantised)
    expected = "a model with weights of class Quantised is not captured"
    assert capturing._Watched(part).obstacle(torch.zeros(2, 3)) == expected


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Graphs of the CPU: each call runs the model. Holds the shapes for which one was recorded."""
    shapes: list[tuple[int, ...]] = []

    def record(self: Any, pixels: Tensor) -> Any:
        shapes.append(tuple(pixels.shape))
        return "operation not permitted" if pixels.shape[0] == 13 else capturing._Graph(None, pixels, None)  # type: ignore[arg-type]

    monkeypatch.setattr(capturing._Recorder, "_record", record)
    monkeypatch.setattr(capturing._Recorder, "replay", lambda self, graph, pixels, copy: self.model(pixels))
    monkeypatch.setattr(CapturedModel, "_ready", lambda self, pixels: bool(self._recording().watched()))
    return shapes


def test_each_shape_and_type_is_recorded_once(recorded: list[tuple[int, ...]]) -> None:
    fast = capture(Part(), torch.zeros(2, 3))
    for batch in (2, 4, 2, 4):
        fast(torch.zeros(batch, 3))
    assert recorded == [(2, 3), (4, 3)]
    fast.record(torch.zeros(2, 3, dtype=torch.double))
    fast.record(torch.zeros(2, 3))
    assert recorded == [(2, 3), (4, 3), (2, 3)]
    assert (fast.graphs, fast.notes) == (3, ())


def test_the_graph_unused_for_longest_gives_way(recorded: list[tuple[int, ...]]) -> None:
    fast = CapturedModel(Part(), max_graphs=2)
    for batch in (2, 4, 2, 6, 2):
        fast(torch.zeros(batch, 3))
    assert (recorded, fast.graphs, fast.notes) == ([(2, 3), (4, 3), (6, 3)], 2, ())
    fast(torch.zeros(4, 3))
    fast(torch.zeros(6, 3))
    assert fast.graphs == 2
    assert fast.notes == ("images of more than 2 shapes come in turns, and each capture takes several forwards; pad "
                          "batches to one size, or type `tokencut.capture(model, example, max_graphs=4)`",)  # fmt: skip


def test_new_weights_are_recorded_anew(recorded: list[tuple[int, ...]]) -> None:
    fast = CapturedModel(Part())
    fast(torch.zeros(2, 3))
    fast.model.load_state_dict(Part().state_dict())
    fast(torch.zeros(2, 3))
    assert len(recorded) == 1
    fast.model.first = nn.Linear(3, 3)
    fast(torch.zeros(2, 3))
    assert len(recorded) == 2
    fast.double()
    assert fast.graphs == 0  # at once: they hold memory
    fast.float()
    fast(torch.zeros(2, 3))
    fast.forget()
    fast(torch.zeros(2, 3))
    assert len(recorded) == 4
    fast.model = Part()
    assert torch.equal(fast(torch.ones(2, 3)), fast.model(torch.ones(2, 3)))
    assert len(recorded) == 5


def test_what_is_captured_already_is_captured_once() -> None:
    part = Part()
    assert capture(capture(part, torch.zeros(2, 3)), torch.zeros(2, 3)).model is part


def test_what_cannot_be_captured_is_tried_once_and_called(recorded: list[tuple[int, ...]]) -> None:
    fast = CapturedModel(Part())
    for _ in range(2):
        assert torch.equal(fast(torch.ones(13, 3)), fast.model(torch.ones(13, 3)))
    assert recorded == [(13, 3)]
    assert fast.notes == ("CUDA could not capture the model, so it is called as it is (operation not permitted)",)
    assert (fast.record(torch.ones(13, 3)), fast.record(torch.ones(2, 3))) == (False, True)


def test_an_evaluation_captures_one_size(recorded: list[tuple[int, ...]], few: Source) -> None:
    digits = load_model("digits").model
    settings: dict[str, Any] = {"device": "cpu", "workers": 0, "batch_size": 16}
    report = tokencut.evaluate(digits, few, capture=True, **settings)
    assert report.correct == tokencut.evaluate(digits, few, **settings).correct
    assert len(report.correct) == 40
    assert [shape[0] for shape in recorded] == [16]


def test_one_form_at_a_time() -> None:
    model = small()
    for run in (
        tokencut.profile,
        partial(tokencut.evaluate, data="digits"),
        partial(tokencut.predict, images="digits"),
    ):
        with pytest.raises(
            UsageError,
            match="^`capture` and `compile_mode` are two ways to run a model, expected "
            "one of them; type `compile_mode='reduce-overhead'`, which compiles it and captures that$",
        ):
            run(model, capture=True, compile_mode="default")


def near(captured: Tensor, eager: Tensor) -> None:
    torch.testing.assert_close(captured.float(), eager.float(), rtol=1e-3, atol=1e-3)


@pytest.fixture
def gpu() -> torch.device:
    torch.manual_seed(0)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dense", *sorted(methods(keeps_grid=False))])
def test_replays_give_the_models_output(method: str, gpu: torch.device) -> None:
    model = (small().model if method == "dense" else small(method)).to(gpu, torch.bfloat16)
    example = images().to(gpu, torch.bfloat16)
    fast = capture(model, example)
    with torch.no_grad():
        for batch, seed in ((2, 2), (1, 3), (5, 4), (2, 5)):
            pixels = images(batch, seed).to(example)
            near(fast(pixels), model(pixels))
        with torch.inference_mode():
            near(fast(example), model(example))
        for weight in model.parameters():  # in place: the same graphs
            weight.add_(0.01 * torch.randn_like(weight))
        near(fast(example), model(example))
        assert (fast.graphs, fast.notes) == (3, ())
        model.load_state_dict({name: weight + 0.01 for name, weight in model.state_dict().items()})
        near(fast(example), model(example))
        assert fast.graphs == 3
        model.float()
        near(fast(example.float()), model(example.float()))
        assert (fast.graphs, fast.notes) == (1, ())


@pytest.mark.gpu
def test_replays_run_no_python_and_outputs_are_copies(gpu: torch.device) -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            calls.append(1)
            return {"double": 2 * x}

    fast, same = (capture(Counting().eval(), torch.ones(2, device=gpu), copy=copy) for copy in (True, False))
    made = len(calls)
    first, second = fast(torch.full((2,), 1.0, device=gpu)), fast(torch.full((2,), 2.0, device=gpu))
    assert (first["double"].tolist(), second["double"].tolist()) == ([2.0, 2.0], [4.0, 4.0])
    assert same(torch.ones(2, device=gpu))["double"] is same(torch.zeros(2, device=gpu))["double"]
    assert len(calls) == made


@pytest.mark.gpu
def test_calls_are_recorded_each_by_itself(gpu: torch.device) -> None:
    x, out = torch.ones(4, device=gpu), torch.zeros(4, device=gpu)
    waits = lambda: out.fill_(float(x.sum()))  # noqa: E731  (waits for the GPU, which no graph can)
    calls = capturing.record_calls(
        {"add": lambda: out.copy_(x + 1), "waits": waits, "mul": lambda: out.copy_(5 * x)}, gpu
    )
    assert calls["waits"] is waits
    x.fill_(3)
    for name, expected in (("add", 4.0), ("mul", 15.0), ("add", 4.0), ("waits", 12.0)):
        calls[name]()
        assert out.tolist() == [expected] * 4


@pytest.mark.gpu
def test_where_it_cannot_be_captured_the_model_is_called(gpu: torch.device) -> None:
    part, x = Part().to(gpu), torch.randn(4, 3, device=gpu)
    fast = capture(part, x)
    fast(x).sum().backward()
    assert part.first.weight.grad is not None
    part.train()
    with torch.no_grad():
        fast(x)
        part.eval()
        handle = part.first.register_forward_hook(lambda *_: None)
        fast(x)
        handle.remove()
        near(fast(x), part(x))
    assert fast.notes == (GRADIENTS, TRAINING, HOOKS)


@pytest.mark.gpu
def test_a_failed_capture_leaves_everything_as_it_was(gpu: torch.device) -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    x, stream = torch.ones(4, device=gpu), torch.cuda.current_stream(gpu)
    works = capture(Part().to(gpu), torch.zeros(4, 3, device=gpu))
    fast = capture(Waits().eval(), x)
    assert fast.notes[0].startswith("CUDA could not capture the model, so it is called as it is (")
    assert "captur" in fast.notes[0].partition("(")[2]
    assert fast(x).tolist() == [4.0] * 4
    assert torch.cuda.current_stream(gpu) == stream
    torch.manual_seed(3)
    drawn = torch.randn(3, device=gpu)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(3, device=gpu), drawn)
    assert not torch.equal(torch.randn(3, device=gpu), drawn)
    with torch.no_grad():
        for batch in (4, 5):
            y = torch.randn(batch, 3, device=gpu)
            near(works(y), works.model(y))
    assert (works.graphs, len(fast.notes)) == (2, 1)


@pytest.mark.gpu
def test_autocast_sees_weights_changed_in_place(gpu: torch.device) -> None:
    model, pixels = small().to(gpu), images().to(gpu)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        fast = capture(model, pixels)
        near(fast(pixels), model(pixels))
        model.model.head.weight.mul_(3)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        near(fast(pixels), model(pixels))
        assert fast.graphs == 1
    with torch.no_grad():
        near(fast(pixels), model(pixels))
    assert fast.graphs == 2


@pytest.mark.gpu
def test_threads_with_streams_of_their_own_do_not_mix(gpu: torch.device) -> None:
    model = small(depth=6).to(gpu)
    batches = [images(batch, seed).to(gpu) for seed in range(4) for batch in (1, 2)]
    fast = capture(model, batches[0])
    with torch.no_grad():
        expected = [model(pixels) for pixels in batches]
    found: dict[int, Tensor] = {}

    def serve(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for _ in range(20):
                for number in range(first, len(batches), 2):
                    found[number] = fast(batches[number])
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=serve, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(expected):
        near(found[number], logits)
    assert (fast.graphs, fast.notes) == (2, ())
