"""What differs between model families: one adapter a family, found by `adapter_for`.

All that an adapter of your own needs is imported from here.
"""

from tokencut.adapters import (  # noqa: F401  (they register themselves)
    beit,
    cait,
    convit,
    eva,
    gemma,
    hiera,
    naflex,
    projected,
    pvt_v2,
    relpos,
    swin,
    video,
    vit,
)
from tokencut.adapters.base import (
    Adapter,
    BareContext,
    Context,
    adapter_for,
    counted_macs,
    default_methods,
    fused_attention_macs,
    known_adapter,
    linear_macs,
    register_adapter,
    supported_modules,
)
from tokencut.adapters.columnar import ColumnarAdapter, described_size, patches
from tokencut.adapters.hierarchy import STAGE, HierarchicalAdapter, Run, tokens_reached
from tokencut.adapters.pairs import PairBiasAdapter, PairContext
from tokencut.adapters.pooling import ClassAndMean, weighted_mean
from tokencut.adapters.positions import PositionedAdapter, grid_positions
from tokencut.adapters.rotary import (
    RotaryAdapter,
    RotaryContext,
    RotatedQueryKey,
    ScaledBlockHandler,
    project_qkv,
    rotary_attention,
)
from tokencut.adapters.space_time import SpaceTimeTransformer
from tokencut.adapters.subclasses import known_class, why_unknown
from tokencut.adapters.vit_blocks import AttentionRun, BlockHandler, Layers, ResPostBlockHandler
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
from tokencut.calling import (
    StandIn,
    StandInSequence,
    call,
    has_hooks,
    is_bare,
    is_patched,
    parts_of,
    through,
    unwrapped,
    wrapped,
)
from tokencut.cost import BlockCost, Macs, ModelCost, TabledMacs
from tokencut.errors import ModelError, UsageError
from tokencut.ops.constants import constant
from tokencut.ops.exporting import exporting
from tokencut.ops.grid_clusters import Windows
from tokencut.ops.grouping import GridGroups
from tokencut.ops.ranking import take
from tokencut.schedule import Keep, Schedule, TokensOut, default_layers, kept_tokens, make_schedule
from tokencut.tokens import Tokens, full_precision, group_means, unclustered
from tokencut.unmerging import Unmerging

__all__ = [
    "Adapter",
    "AttentionInfo",
    "AttentionRun",
    "BareContext",
    "BlockCost",
    "BlockHandler",
    "ClassAndMean",
    "ColumnarAdapter",
    "Context",
    "GridGroups",
    "HierarchicalAdapter",
    "Keep",
    "Layers",
    "Macs",
    "ModelCost",
    "ModelError",
    "PairBiasAdapter",
    "PairContext",
    "PositionedAdapter",
    "QueryKey",
    "ResPostBlockHandler",
    "RotaryAdapter",
    "RotaryContext",
    "RotatedQueryKey",
    "Run",
    "STAGE",
    "ScaledBlockHandler",
    "Schedule",
    "StandIn",
    "StandInSequence",
    "TabledMacs",
    "SpaceTimeTransformer",
    "TimmModule",
    "Tokens",
    "TokensOut",
    "UsageError",
    "Unmerging",
    "Windows",
    "adapter_for",
    "call",
    "constant",
    "counted_macs",
    "default_layers",
    "default_methods",
    "described_size",
    "differential_attention",
    "differential_core",
    "full_precision",
    "exporting",
    "fused_attention",
    "fused_attention_macs",
    "grid_positions",
    "group_means",
    "has_biased_kernel",
    "has_hooks",
    "instead_of",
    "is_bare",
    "is_patched",
    "kept_tokens",
    "known_adapter",
    "known_class",
    "linear_macs",
    "make_schedule",
    "mixed_values",
    "parts_of",
    "patches",
    "plain_model",
    "project_qkv",
    "refuse_sharded",
    "register_adapter",
    "rotary_attention",
    "self_attention",
    "supported_modules",
    "take",
    "through",
    "tokens_reached",
    "unclustered",
    "unwrapped",
    "weighted_mean",
    "why_unknown",
    "wrapped",
]
