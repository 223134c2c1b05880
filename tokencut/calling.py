"""Calling a module with other code in place of its `forward`: its hooks, and what is around it, run all the same.

A stage stands in the middle of a block, so a block that reduces is not run by its own `forward`. What others have put
around the block has to act nevertheless, as it does on the blocks that timm runs: hooks (torch's own, those of FSDP2,
profilers, feature extraction), activation checkpointing, `torch.compile`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils.hooks import BackwardHook

# What runs a model, or a part of it.
_FORWARDS = ("forward", "forward_features", "forward_head")
# What wraps one module and does nothing else to its numbers, by the attribute that holds the module.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, torch's checkpoint_wrapper


def has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks were put on this module."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its `forward`: hooks of its own, or torch's global ones."""
    return bool(  # asked of each module that is passed by: the former spelled out takes half the time
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_backward_pre_hooks
        or everywhere._global_backward_hooks
    )


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's `forward`: nobody is hooked to it, nothing is wrapped around it,
    it was not compiled in place and nobody has put another `forward` on it.
    """
    plain = module._compiled_call_impl is None and "forward" not in vars(module)
    return plain and not has_hooks(module) and wrapped(module) is None


def parts_of(module: nn.Module) -> Mapping[str, Any]:
    """The modules that a module holds, by name; `nn.Module` itself takes 0.6 us to find one."""
    return unwrapped(module)._modules


def through(module: nn.Module, x: Tensor) -> Tensor:
    """What `module(x)` gives, without the call where the module does nothing, or is a linear layer: of the 1.2 us that
    `nn.Module` takes to call, and the 1.3 to find two weights, a block of timm's has ten of the one and four of both.

    Not where anything is around the module (`is_bare`), nor where a compiler or a tracer notes which modules run.
    """
    kind = type(module)
    if kind not in _PASSED_BY or has_hooks(module) or "forward" in vars(module) or _is_noted(module):
        called: Tensor = module(x)
        return called
    if kind is not nn.Linear:
        return module(x) if kind is nn.Dropout and module.training and module.p else x
    weight = module._parameters.get("weight")
    # What DataParallel makes of a layer holds them elsewhere.
    return module(x) if weight is None else F.linear(x, weight, module._parameters["bias"])


_PASSED_BY = (nn.Identity, nn.Dropout, nn.Linear)


def _is_noted(module: nn.Module) -> bool:
    """Whether calling a module means more than its `forward`: a compiled one, or to whoever records what runs."""
    return (
        module._compiled_call_impl is not None
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
    )


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper that changes no numbers (`torch.compile`, `checkpoint_wrapper`); None for others."""
    for name in _WRAPPERS:
        if name in module._modules:
            return module._modules[name]
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all such wrappers; itself where there are none."""
    inside = wrapped(module)
    return module if inside is None else unwrapped(inside)


def is_patched(module: nn.Module) -> bool:
    """Whether somebody has put another `forward` (or `forward_features`, ...) on this one module over its class's."""
    inner = unwrapped(module)
    own = vars(inner)
    for name in _FORWARDS:  # noqa: SIM110 (asked in each forward: a generator takes twice as long)
        if name in own and not _is_classes(inner, name):
            return True
    return False


def _is_classes(module: nn.Module, name: str) -> bool:
    """Whether what stands on a module is its class's own method, as accelerate leaves it after unwrapping."""
    method = vars(module)[name]
    same = getattr(method, "__func__", None) is getattr(type(module), name, None)
    return same and getattr(method, "__self__", None) is module


def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `module(*args, **kwargs)` does, with other code in place of the module's `forward`.

    Args:
        module: Whose hooks and wrappers run, in torch's order and with torch's arguments.
        forward: Takes the arguments, as pre-hooks have left them, and gives the output.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The output, as hooks have left it.
    """
    inside = wrapped(module)
    if inside is not None:
        forward = partial(call, inside, forward)
        checkpoint: Any = getattr(module, "checkpoint_fn", None)
        if checkpoint is not None:
            forward = partial(checkpoint, forward)
    return _hooked(module, forward, args, kwargs) if has_hooks(module) else forward(*args, **kwargs)


def _hooked(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `torch.nn.Module._call_impl`, which knows no other forward than the module's own."""
    ran: set[int] = set()
    try:
        return _run_hooks(module, forward, args, kwargs, ran)
    except Exception:
        if not torch.compiler.is_compiling():  # torch does the same
            _run_always_called(module, args, kwargs, ran)
        raise


def _run_hooks(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ran: set[int]
) -> Any:
    full, plain, before = _backward_hooks(module)
    for number, hook in (*everywhere._global_forward_pre_hooks.items(), *module._forward_pre_hooks.items()):
        if number in module._forward_pre_hooks_with_kwargs:
            given: Any = hook(module, args, kwargs)
            if given is not None:
                args, kwargs = given
        else:
            given = hook(module, args)
            if given is not None:
                args = given if isinstance(given, tuple) else (given,)
    backward = BackwardHook(module, full, before) if full or before else None
    if backward is not None:
        args = backward.setup_input_hook(args)
    result = forward(*args, **kwargs)
    for number, hook, takes_kwargs in _forward_hooks(module):
        ran.add(number)
        given = hook(module, args, kwargs, result) if takes_kwargs else hook(module, args, result)
        if given is not None:
            result = given
    if backward is not None:
        result = backward.setup_output_hook(result)
    if plain and getattr(result, "grad_fn", None) is not None:
        for hook in plain:  # register_backward_hook, which torch advises against: on the last operation's gradients
            result.grad_fn.register_hook(partial(hook, module))
    return result


def _backward_hooks(module: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """The full backward hooks, those that are not full, and the backward pre-hooks."""
    full, plain, before = [], [], []
    if module._backward_pre_hooks or everywhere._global_backward_pre_hooks:
        before = module._get_backward_pre_hooks()
    if module._backward_hooks or everywhere._global_backward_hooks:
        full, plain = module._get_backward_hooks()
    return full, plain, before


def _forward_hooks(module: nn.Module) -> list[tuple[int, Any, bool]]:
    """The forward hooks in order: number, hook, and whether it takes the keyword arguments."""
    taking = {*everywhere._global_forward_hooks_with_kwargs, *module._forward_hooks_with_kwargs}
    hooks = (*everywhere._global_forward_hooks.items(), *module._forward_hooks.items())
    return [(number, hook, number in taking) for number, hook in hooks]


def _run_always_called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ran: set[int]) -> None:
    """Runs the hooks that asked to be called after a failure too (`always_call=True`)."""
    always = {*everywhere._global_forward_hooks_always_called, *module._forward_hooks_always_called}
    for number, hook, takes_kwargs in _forward_hooks(module):
        if number in always and number not in ran:
            with contextlib.suppress(Exception):  # the first failure is the one to tell
                _ = hook(module, args, kwargs, None) if takes_kwargs else hook(module, args, None)


class StandIn:
    """A module with some of its attributes replaced, for one call: its class's own code runs, and the module, which is
    not touched, keeps its hooks and its parts.

    So timm's own forward runs a model with one stage in another form: what it looks up on `self` it finds here. Calling
    it runs the module's hooks and wrappers as `call` does, on the module itself.
    """

    def __init__(self, module: nn.Module, **replaced: Any) -> None:
        """Stands in for a module.

        Args:
            module: The module, also in a wrapper that changes no numbers.
            replaced: What its attributes are instead, by name.
        """
        self._called = module
        self._module = unwrapped(module)
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        own = getattr(type(self._module), name, None)
        # A method has to see the replacements too. torch.compile follows a partial, and no types.MethodType.
        return partial(own, self) if isinstance(own, FunctionType) else getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self._called, self.forward, *args, **kwargs)


class StandInSequence:
    """A `Sequential` with other parts in place of some of its own, for one call."""

    def __init__(self, module: nn.Module, parts: Sequence[Any]) -> None:
        """Stands in for a module.

        Args:
            module: The `Sequential`.
            parts: What it runs instead, one after the other.
        """
        self._called = module
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts)

    def __getitem__(self, place: int | slice) -> Any:
        parts = self._parts[place]
        return StandInSequence(self._called, parts) if isinstance(place, slice) else parts

    def __call__(self, features: Any) -> Any:
        return call(self._called, self._run, features)

    def _run(self, features: Any) -> Any:
        for part in self._parts:
            features = part(features)
        return features
