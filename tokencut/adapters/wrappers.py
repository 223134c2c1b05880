"""What people put around a timm model: taken off where the model inside does the same, else named with what to pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokencut.calling import wrapped
from tokencut.errors import ModelError


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers that change nothing of what it computes.

    Args:
        model: A model, or one in `torch.compile`, `DataParallel`, `DistributedDataParallel` or torch's
            `checkpoint_wrapper`.
    """
    inside = model.module if isinstance(model, (nn.DataParallel, DistributedDataParallel)) else wrapped(model)
    return model if inside is None else plain_model(inside)


def refuse_sharded(model: nn.Module) -> None:
    """Refuses a model whose weights `fully_shard` has spread over processes: it can be neither copied nor written.

    Raises:
        ModelError: Saying what to do first.
    """
    sharded = (name for name, part in model.named_modules()
               if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__))  # fmt: skip
    name = next(sharded, None)
    if name is not None:
        raise ModelError(f"{name or 'the model'} is sharded by fully_shard, and a part is no model; do this "
                         "before fully_shard, or with a model that was given the full state dict "
                         "(torch.distributed.checkpoint.state_dict.get_model_state_dict)")  # fmt: skip


def instead_of(model: nn.Module, is_known: Callable[[nn.Module], bool]) -> str | None:
    """What to pass in place of a model that is not supported as it is, for a message; None where nothing is known.

    Args:
        model: The model.
        is_known: Whether a model is what is wanted, such as one of a supported family.
    """
    kinds = {kind.__module__.split(".")[0] + "." + kind.__name__ for kind in type(model).__mro__}
    if kinds & {"peft.PeftModel", "peft.PeftMixedModel"}:
        return ("a model of peft; pass `model.merge_and_unload()`, or compress the timm model and put peft around what "
                "comes of it")  # fmt: skip
    if "torch.FullyShardedDataParallel" in kinds:
        return "sharded by FSDP; compress the model first, then use `fully_shard` on what compress returns"
    if kinds & {"torch.ScriptModule", "torch.GraphModule"}:
        return "a recorded program, not a model; pass the model that it was made from"
    if "timm.FeatureGetterNet" in kinds:
        return ("a backbone; compress the whole model, built without `features_only`, and pass the result to "
                "`tokencut.features_only`")  # fmt: skip
    inside = next((name for name, part in model.named_modules() if name and is_known(plain_model(part))), None)
    if inside is not None:
        names = inside.split(".")
        path = inside if all(name.isidentifier() for name in names) else f"get_submodule({inside!r})"
        return f"something around a model; pass that, `model.{path}`"
    if "transformers.PreTrainedModel" in kinds:
        return ("a model of transformers; write it by `model.save_pretrained('FOLDER')` and open the folder by "
                "`tokencut.models.loading.load_model('FOLDER').model`")  # fmt: skip
    return None
