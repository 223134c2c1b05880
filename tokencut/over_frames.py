"""A model of images on clips: it sees each frame by itself, and what it says of them is averaged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokencut.errors import UsageError
from tokencut.limits import check_number


class OverFrames(nn.Module):
    """A model of images that takes clips, `(B, C, frames, H, W)`: the mean of its logits, or features, over the frames.

    Attributes:
        model: The model of images, dense or compressed.
        frames: Frames of a clip.

    Raises:
        UsageError: The number is out of range, or the model takes clips by itself.
    """

    def __init__(self, model: nn.Module, frames: int) -> None:
        super().__init__()
        check_number("frames", frames)
        self.model = model
        self.frames = frames
        embed: Any = getattr(getattr(model, "model", model), "patch_embed", None)
        own = getattr(embed, "num_frames", None) or (getattr(model, "pretrained_cfg", None) or {}).get("frames")
        if own:
            raise UsageError(f"this model takes clips of {own} frames by itself; leave `frames` "
                             "out, or build it with `num_frames=8`")  # fmt: skip

    @property
    def num_classes(self) -> int:
        """Classes of the model's head, 0 for none."""
        return int(getattr(self.model, "num_classes", 0) or 0)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the model, and how many frames it sees."""
        return {**(getattr(self.model, "pretrained_cfg", None) or {}), "frames": self.frames}

    def forward(self, clips: Tensor) -> Tensor:
        """Logits `(B, classes)` for clips `(B, C, frames, H, W)`, whichever number of frames they have."""
        images = clips.transpose(1, 2).flatten(0, 1)
        logits: Tensor = self.model(images)
        return logits.unflatten(0, (-1, clips.shape[2])).mean(1)


def of_images(model: nn.Module) -> nn.Module:
    """The model of images inside one of clips by `OverFrames`; any other as it is."""
    return model.model if isinstance(model, OverFrames) else model
