"""What differs between model families: one adapter a family, found by `adapter_for`.

All that an adapter of your own needs is imported from here.
"""

from tokencut.adapters import vit  # noqa: F401  (registers itself)
from tokencut.adapters.base import (
    Adapter,
    Context,
    adapter_for,
    counted_macs,
    fused_attention_macs,
    known_adapter,
    linear_macs,
    register_adapter,
    supported_modules,
)
from tokencut.adapters.pooling import ClassAndMean, weighted_mean
from tokencut.adapters.subclasses import known_class, why_unknown
from tokencut.adapters.wrappers import instead_of, plain_model, refuse_sharded
from tokencut.attention import (
    AttentionInfo,
    QueryKey,
    TimmModule,
    differential_attention,
    differential_core,
    fused_attention,
    has_biased_kernel,
    mixed_values,
    self_attention,
)
from tokencut.calling import call, has_hooks, is_patched, unwrapped, wrapped
from tokencut.cost import BlockCost, Macs, ModelCost
from tokencut.errors import ModelError
from tokencut.tokens import Tokens

__all__ = [
    "Adapter",
    "BlockCost",
    "ClassAndMean",
    "Context",
    "AttentionInfo",
    "QueryKey",
    "Macs",
    "ModelCost",
    "ModelError",
    "TimmModule",
    "Tokens",
    "adapter_for",
    "call",
    "counted_macs",
    "differential_attention",
    "differential_core",
    "fused_attention",
    "fused_attention_macs",
    "has_biased_kernel",
    "has_hooks",
    "is_patched",
    "instead_of",
    "known_adapter",
    "known_class",
    "linear_macs",
    "mixed_values",
    "plain_model",
    "refuse_sharded",
    "register_adapter",
    "self_attention",
    "supported_modules",
    "weighted_mean",
    "unwrapped",
    "wrapped",
    "why_unknown",
]
