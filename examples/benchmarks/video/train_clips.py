"""Trains a small video transformer of VideoMAE's shape on clips of moving digits, rendered as it goes.

    python examples/benchmarks/run.py train_clips -o moving-digits/ --seconds 220     # on a GPU

16 frames of 64 px in tubelets of 2 x 8 x 8 are 512 tokens; 12 blocks of width 192. The files of `clips` are H.264, and
no two training clips are alike: so these are rendered on the GPU, at the frames that sampling takes of a file, and
quantised block by block in place of a codec. Into the output folder go config.json and model.safetensors (fp16), as
transformers' `save_pretrained` writes them for VideoMAEForVideoClassification.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import tokencut.adapters  # noqa: F401  (gives timm the names of video models)
from video.clips import CLASSES, SIDE, batch, inks

FRAMES, WIDTH, DEPTH, HEADS, PATCH, TUBELET = 16, 192, 12, 3, 8, 2
MEAN, STD = 0.45, 0.225


def build() -> Any:
    """The model, with random weights."""
    return timm.create_model(
        "videomae_small_patch16_224", img_size=SIDE, patch_size=PATCH, num_frames=FRAMES, tubelet_size=TUBELET,
        embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=len(CLASSES), norm_eps=1e-6, fc_norm_eps=1e-5,
        drop_path_rate=0.05,
    )  # fmt: skip


def quantised(clips: Tensor, rng: torch.Generator) -> Tensor:
    """Clips with what a codec leaves of them: each 8 x 8 block's cosines, rounded to a step that differs by clip."""
    place = torch.arange(8, device=clips.device)
    cosines = (math.pi / 8 * (place + 0.5)[None] * place[:, None]).cos() * 0.5
    cosines[0] *= math.sqrt(0.5)
    step = torch.rand(len(clips), 1, 1, 1, 1, 1, 1, generator=rng, device=clips.device) * 0.12 + 0.01
    blocks = clips.unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).transpose(4, 5)
    found = (cosines @ blocks @ cosines.T / step).round() * step
    return (cosines.T @ found @ cosines).transpose(4, 5).flatten(5, 6).flatten(3, 4).clamp(0, 1)


def normalised(clips: Tensor) -> Tensor:
    """Clips as the model takes them."""
    return ((clips * 255).round() / 255 - MEAN) / STD


def train(model: nn.Module, seconds: float, device: torch.device, size: int, rate: float) -> None:
    """Trains for so many seconds; the learning rate follows the clock."""
    ink, label = (part.to(device) for part in inks("train"))
    rng = torch.Generator(device).manual_seed(3)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    forward = torch.compile(model) if device.type == "cuda" else model
    model.train()
    started = time.perf_counter()
    done = seen = 0
    while (share := (time.perf_counter() - started) / seconds) < 1:
        lr = rate * min(1.0, (done + 1) / 150) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.no_grad():
            clips, classes = batch(ink, label, size, FRAMES, rng)
            clips = normalised(quantised(clips, rng))
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(clips)
        loss = F.cross_entropy(logits.float(), classes, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done, seen = done + 1, seen + size
        if done % 50 == 1:
            right = (logits.argmax(1) == classes).float().mean()
            print(f"{time.perf_counter() - started:6.1f} s {done:5} steps {seen:8} clips loss {loss:.3f} "
                  f"right {right:.3f}", flush=True)  # fmt: skip


@torch.no_grad()
def judge(model: nn.Module, device: torch.device) -> float:
    """Percent right on 2,000 rendered clips of digits that no training clip shows."""
    ink, label = (part.to(device) for part in inks("test"))
    rng, right = torch.Generator(device).manual_seed(4), 0
    model.eval()
    for _ in range(20):
        clips, classes = batch(ink, label, 100, FRAMES, rng)
        with torch.autocast(device.type, torch.bfloat16):
            right += int((model(normalised(quantised(clips, rng))).argmax(1) == classes).sum())
    return right / 20


def save(model: Any, folder: Path) -> None:
    """Writes the model as transformers' `save_pretrained` writes VideoMAEForVideoClassification."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "patch_embed.proj.": "videomae.embeddings.patch_embeddings.projection.", "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.", "attn.proj.": "attention.output.dense.", "mlp.fc1.": "intermediate.dense.",
        "mlp.fc2.": "output.dense.", "head.": "classifier.", "blocks.": "videomae.encoder.layer.",
    }  # fmt: skip
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name.endswith("attn.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
        elif name.endswith("attn.qkv.bias"):  # adding one number to all keys' products changes no attention
            query, _, value = tensor.chunk(3)
            tensors[name.replace("attn.qkv", "attention.attention.query")] = query
            tensors[name.replace("attn.qkv", "attention.attention.value")] = value
        elif name != "pos_embed":
            tensors[name] = tensor
    halves = {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "videomae", "architectures": ["VideoMAEForVideoClassification"], "image_size": SIDE,
        "patch_size": PATCH, "num_channels": 3, "num_frames": FRAMES, "tubelet_size": TUBELET, "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "qkv_bias": True, "use_mean_pooling": True,
        "id2label": {str(number): name for number, name in enumerate(CLASSES)},
        "label2id": {name: number for number, name in enumerate(CLASSES)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = {"do_resize": True, "size": {"shortest_edge": SIDE}, "do_center_crop": True,
                 "crop_size": {"height": SIDE, "width": SIDE}, "do_normalize": True, "image_mean": [MEAN] * 3,
                 "image_std": [STD] * 3, "resample": 2, "image_processor_type": "VideoMAEImageProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--seconds", type=float, default=220, help="how long to train; default 220")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(words)


def main() -> None:
    """Trains and saves."""
    args = parse()
    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    model = build().to(device)
    train(model, args.seconds, device, args.batch, args.lr)
    save(model, args.output)
    print(f"{judge(model, device):.2f} % right on rendered clips")


if __name__ == "__main__":
    main()
