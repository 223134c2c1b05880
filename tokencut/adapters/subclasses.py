"""Classes derived from timm's: taken where they run as timm's do, else refused with what they change."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from tokencut.calling import unwrapped

# What timm's classes define and no forward goes through: building, training and taking apart.
_NOT_RUN = {
    "_init_weights",
    "extra_repr",
    "fix_init_weight",
    "get_classifier",
    "get_intermediate_layers",
    "group_matcher",
    "init_non_persistent_buffers",
    "init_weights",
    "load_pretrained",
    "no_weight_decay",
    "prune_intermediate_layers",
    "reset_classifier",
    "reset_parameters",
    "set_distilled_training",
    "set_grad_checkpointing",
    "set_input_size",
}
# What torch calls a module by, and finds its parts by.
_TORCH = ("__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward", "__getattr__", "__getattribute__")


def known_class(module: nn.Module, known: Collection[type[nn.Module]]) -> type[nn.Module] | None:
    """As which of the known classes a module runs.

    Args:
        module: A module, or one in a wrapper that changes no numbers.
        known: The classes to look for.

    Returns:
        The module's own class, or the nearest one that it is derived from, if nothing of the forward path is
        overridden; else None.
    """
    own: type[nn.Module] = type(module)
    if own in known:
        return own
    own = type(unwrapped(module))
    base = _base(own, known)
    return None if base is None or overridden(own, base) else base


def why_unknown(module: nn.Module, known: Collection[type[nn.Module]]) -> str | None:
    """What a class derived from a known one overrides, in words; None for a class that is not derived from any."""
    own = type(unwrapped(module))
    base = _base(own, known)
    if base is None or not overridden(own, base):
        return None
    return f"{own.__name__} is derived from {base.__name__}, but has its own {', '.join(overridden(own, base))}"


def overridden(own: type[nn.Module], base: type[nn.Module]) -> tuple[str, ...]:
    """The names of the forward path that a class derived from one of timm's defines anew, sorted.

    Args:
        own: The class.
        base: The class of timm's that it is derived from.
    """
    if own is base:
        return ()
    return tuple(sorted(name for name in forward_path(base) if getattr(own, name) is not getattr(base, name)))


def forward_path(base: type[nn.Module]) -> set[str]:
    """All that a class of timm's defines and a forward may go through."""
    ours = (vars(part) for part in base.__mro__ if part not in nn.Module.__mro__)
    names = {name for part in ours for name in part if not name.startswith("__") and name not in _NOT_RUN}
    return names | set(_TORCH)


def _base(own: type[nn.Module], known: Collection[type[nn.Module]]) -> type[nn.Module] | None:
    return next((base for base in own.__mro__ if base in known), None)
