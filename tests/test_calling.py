"""call(): what torch runs around a module's forward, around other code in its place, in the same order and way."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.modules import module as everywhere

from tokencut.calling import StandIn, StandInSequence, call, has_hooks, is_patched, through, unwrapped

Log = list[tuple[Any, ...]]
Run = Callable[[nn.Module, Tensor], Tensor]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return x * self.weight + shift


def by_torch(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, shift=1.0)


def by_call(module: nn.Module, x: Tensor) -> Tensor:
    inner = unwrapped(module)
    return call(module, lambda x, shift=0.0: x * inner.weight + shift, x, shift=1.0)


def told(log: Log, name: str, give: Any = None) -> Callable[..., Any]:
    """A hook that notes whom it was told about and what, and changes that where `give` makes something of it."""

    def hook(module: nn.Module, *seen: Any) -> Any:
        log.append((name, type(module).__name__, copy.deepcopy([str(value) for value in seen])))
        return give(*seen) if give else None

    return hook


def with_all_hooks(module: nn.Module, log: Log, handles: ExitStack) -> None:
    """Each kind of hook, of the module and of torch, half of them changing what passes."""

    def kept(handle: Any) -> None:
        handles.callback(handle.remove)

    module.register_forward_pre_hook(told(log, "pre", lambda args: args[0] * 2))
    module.register_forward_pre_hook(told(log, "pre first"), prepend=True)
    module.register_forward_pre_hook(
        told(log, "pre kwargs", lambda args, kwargs: (args, {"shift": 5.0})), with_kwargs=True
    )
    module.register_forward_hook(told(log, "post", lambda args, out: out + 1))
    module.register_forward_hook(told(log, "post kwargs"), with_kwargs=True)
    module.register_full_backward_pre_hook(told(log, "back pre", lambda grad: (grad[0] * 3,)))
    module.register_full_backward_hook(told(log, "back", lambda into, out: (into[0] * 7,)))
    kept(everywhere.register_module_forward_pre_hook(told(log, "all pre")))
    kept(everywhere.register_module_forward_hook(told(log, "all post")))
    kept(everywhere.register_module_full_backward_hook(told(log, "all back")))
    kept(everywhere.register_module_full_backward_pre_hook(told(log, "all back pre")))


def outcome(run: Run, prepare: Callable[[nn.Module, Log, ExitStack], None]) -> tuple[Log, Tensor, Tensor, Tensor]:
    module, log, x = Scaled(), [], torch.tensor([[1.0, -1.0, 0.5]], requires_grad=True)
    with ExitStack() as handles:
        prepare(module, log, handles)
        out = run(module, x)
        out.square().sum().backward()
    return log, out.detach(), x.grad, module.weight.grad


def test_every_kind_of_hook_runs_as_torch_runs_it() -> None:
    theirs, ours = (outcome(run, with_all_hooks) for run in (by_torch, by_call))
    assert [entry[0] for entry in theirs[0]][:4] == ["all pre", "pre first", "pre", "pre kwargs"]
    assert len(theirs[0]) == 11
    for expected, got in zip(theirs[0], ours[0], strict=True):
        assert expected == got
    for expected, got in zip(theirs[1:], ours[1:], strict=True):
        assert torch.equal(expected, got)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_a_backward_hook_of_the_old_kind_runs_too() -> None:
    def prepare(module: nn.Module, log: Log, handles: ExitStack) -> None:
        module.register_backward_hook(lambda module, into, out: log.append((type(module).__name__, str(out))))

    theirs, ours = (outcome(run, prepare) for run in (by_torch, by_call))
    assert theirs[0] == ours[0] and len(ours[0]) == 1


@pytest.mark.parametrize("run", [by_torch, by_call])
def test_hooks_that_want_to_be_called_after_a_failure_are(run: Run) -> None:
    module, log = Scaled(), []
    module.register_forward_hook(told(log, "first"))
    module.register_forward_hook(told(log, "always"), always_call=True)
    with pytest.raises(RuntimeError, match="must match the size"):
        run(module, torch.zeros(1, 4))
    assert [entry[0] for entry in log] == ["always"]


def test_without_hooks_nothing_is_added() -> None:
    module = Scaled()
    assert not has_hooks(module)
    handle = module.register_forward_hook(lambda *_: None)
    assert has_hooks(module)
    handle.remove()
    assert not has_hooks(module)
    handle = everywhere.register_module_forward_hook(lambda *_: None)
    assert has_hooks(module)
    handle.remove()


@pytest.mark.parametrize("kind", CheckpointImpl)
def test_a_checkpoint_wrapper_keeps_its_word(kind: CheckpointImpl) -> None:
    """The code runs once more in backward, on the same input, and hooks of wrapper and module both run."""
    log: Log = []
    module = Scaled()
    module.register_forward_hook(told(log, "inside", lambda args, out: out * 2))
    wrapper = checkpoint_wrapper(module, checkpoint_impl=kind)
    wrapper.register_forward_hook(told(log, "outside"))
    x = torch.ones(1, 3, requires_grad=True)
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x * module.weight

    out = call(wrapper, forward, x)
    assert [entry[0] for entry in log] == ["inside", "outside"] and len(seen) == 1
    out.sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    assert torch.equal(x.grad, 2 * module.weight.detach().unsqueeze(0))


def test_a_forward_put_on_one_module_is_seen_through_wrappers() -> None:
    module = Scaled()
    wrapper = checkpoint_wrapper(module)
    assert not is_patched(wrapper)
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert is_patched(module) and is_patched(wrapper)
    module.forward = types.MethodType(Scaled.forward, module)  # type: ignore[method-assign]
    assert not is_patched(module) and not is_patched(copy.deepcopy(module))
    module.forward = types.MethodType(Scaled.forward, Scaled())  # type: ignore[method-assign]
    assert is_patched(module)
    del module.forward
    assert not is_patched(module)


class Twice(nn.Module):
    """Two parts by its own method, which its forward calls."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Scaled(), Scaled())

    def scaled(self, x: Tensor) -> Tensor:
        return self.factor * x

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.parts(x))


def test_a_stand_in_answers_for_what_is_replaced_in_the_modules_own_code() -> None:
    module, x, seen = Twice(), torch.ones(3), list[tuple[nn.Module, Tensor]]()
    for part in module.modules():
        part.register_forward_hook(lambda part, _, output: seen.append((part, output)))
    parts = StandInSequence(module.parts, [module.parts[0], lambda x: x + 1])
    other = StandIn(module, factor=3.0, parts=parts)
    assert torch.equal(other(x), 3 * (x * module.parts[0].weight + 1))
    assert [part for part, _ in seen] == [module.parts[0], module.parts, module]
    seen.clear()
    assert torch.equal(module(x), 2 * x * module.parts[0].weight ** 2), "the module itself is as it was"
    assert [part for part, _ in seen] == [*module.parts, module.parts, module]
    assert len(parts) == 2 and list(parts)[0] is module.parts[0] and len(parts[:1]) == 1
    assert torch.equal(parts[:1](x), x * module.parts[0].weight)


def test_a_stand_in_for_a_wrapped_module_runs_the_wrapper() -> None:
    inner = Scaled()
    ran: list[str] = []
    outer = checkpoint_wrapper(inner, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    outer.register_forward_hook(lambda *_: ran.append("outer"))
    inner.register_forward_hook(lambda *_: ran.append("inner"))
    x = torch.ones(3, requires_grad=True)
    StandIn(outer, weight=torch.tensor([5.0, 6.0, 7.0]))(x).sum().backward()
    assert ran[:2] == ["inner", "outer"] and x.grad is not None
    assert x.grad.tolist() == [5.0, 6.0, 7.0]


class Counting(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_through_calls_what_does_something_or_is_hooked_or_patched() -> None:
    x = torch.ones(4)
    for idle in (nn.Identity(), nn.Dropout(0.5).eval(), nn.Dropout(0.0)):
        assert through(idle, x) is x
        patched = copy.deepcopy(idle)
        patched.forward = lambda given: given + 2  # type: ignore[method-assign]
        assert torch.equal(through(patched, x), x + 2)
        handle = idle.register_forward_hook(lambda _, __, output: output + 3)
        assert torch.equal(through(idle, x), x + 3)
        handle.remove()
        assert through(idle, x) is x
    assert torch.equal(through(Counting(), x), x + 1)
    linear = nn.Linear(4, 3)
    assert torch.equal(through(linear, x), linear(x))
    handle = linear.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert torch.equal(through(linear, x), linear(x))
    handle.remove()
    replica = copy.copy(linear)  # as DataParallel makes it
    replica._parameters = {}
    replica.__dict__.update(weight=2 * linear.weight, bias=linear.bias)
    assert torch.equal(through(replica, x), 2 * linear(x) - linear.bias)
    linear._compiled_call_impl = lambda given: given + 4  # type: ignore[assignment]  # as Module.compile() leaves it
    assert torch.equal(through(linear, x), x + 4)
    assert through(nn.Dropout(1.0), x).sum() == 0


def test_through_runs_torchs_global_hooks() -> None:
    seen: list[str] = []
    handle = everywhere.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        through(nn.Identity(), torch.ones(1))
    finally:
        handle.remove()
    assert seen == ["Identity"]
