"""The pocket vision backbone: a small CLIP-like ViT that learns to say what each patch shows.

Region-phrase prediction: every patch predicts each word of the phrase that describes what covers
it (shape, colour, size, texture, sign word, place, background) and the box of that thing. The heads
are thrown away; what remains is a Hugging Face folder with a `CLIPVisionModel`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pumice.core.log import get_logger
from pumice.world.scenes import (
    BACKGROUNDS,
    CELL,
    COLORS,
    SHAPES,
    SIZE,
    SIZES,
    TEXTURES,
    WORDS,
    Scene,
    random_scene,
    render,
)

if TYPE_CHECKING:
    import torch

log = get_logger(__name__)

VIEW = 96
PATCH = 16
GRID = VIEW // PATCH
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Scenes from here on are never rendered by `make_world`, so the backbone has not seen its images.
FIRST_SCENE = 10_000_000
GROUPS: dict[str, tuple[str, ...]] = {
    "shape": ("nothing", "sign", *SHAPES),
    "color": ("none", *COLORS),
    "size": ("none", *SIZES),
    "texture": ("none", *TEXTURES),
    "word": ("none", *WORDS),
    "row": ("top", "middle", "bottom"),
    "column": ("left", "center", "right"),
    "background": tuple(BACKGROUNDS),
}


def patch_owner(scene: Scene) -> np.ndarray:
    """int[6, 6]: which thing covers each patch (its index), -1 where there is none.

    A patch belongs to a thing when the thing's box covers an eighth of it; every thing owns at
    least the patch under its centre.
    """
    owner = np.full((GRID, GRID), -1, dtype=np.int64)
    step = SIZE / GRID
    for index, thing in enumerate(scene.things):
        x0, y0, x1, y1 = (value / step for value in thing.box)
        for row in range(thing.row * 2, thing.row * 2 + 2):
            for column in range(thing.column * 2, thing.column * 2 + 2):
                width = min(x1, column + 1) - max(x0, column)
                height = min(y1, row + 1) - max(y0, row)
                if width > 0 and height > 0 and width * height > 0.125:
                    owner[row, column] = index
        owner[int((y0 + y1) / 2), int((x0 + x1) / 2)] = index
    return owner


def region_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """int[36, groups], float[36, 4]: the words of each patch's phrase, its thing's box in 0..1."""
    owner = patch_owner(scene)
    words = np.zeros((GRID * GRID, len(GROUPS)), dtype=np.int64)
    boxes = np.full((GRID * GRID, 4), -1.0, dtype=np.float32)
    for patch in range(GRID * GRID):
        row, column = divmod(patch, GRID)
        index = owner[row, column]
        thing = scene.things[index] if index >= 0 else None
        phrase = {
            "shape": thing.shape if thing else "nothing",
            "color": (thing.color if thing else "") or "none",
            "size": (thing.size if thing else "") or "none",
            "texture": (thing.texture if thing else "") or "none",
            "word": (thing.word if thing else "") or "none",
            "row": GROUPS["row"][row // 2],
            "column": GROUPS["column"][column // 2],
            "background": scene.background,
        }
        words[patch] = [names.index(phrase[group]) for group, names in GROUPS.items()]
        if thing:
            boxes[patch] = np.asarray(thing.box, dtype=np.float32) / SIZE
    return words, boxes


def view(image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
    """float[3, 96, 96]: the normalised picture, with a little pixel noise when `rng` is given."""
    pixels = np.asarray(image.resize((VIEW, VIEW), Image.Resampling.BICUBIC), dtype=np.float32)
    if rng is not None:
        pixels = pixels + rng.normal(0, rng.uniform(0, 8), pixels.shape).astype(np.float32)
    normalised = (pixels / 255 - np.asarray(MEAN)) / np.asarray(STD)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def train_vision(
    out: Path,
    *,
    steps: int = 5000,
    batch_size: int = 32,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train the backbone from nothing and write it to `out` with `quality.json`.

    `report` hears the number of steps done and the loss after every step.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=VIEW, patch_size=PATCH, hidden_act="gelu", attn_implementation="eager",
    )  # fmt: skip
    model = CLIPVisionModel(config)
    _sine_positions(model)
    heads = _Heads(config.hidden_size)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.5e-3, total_steps=steps, pct_start=0.05, anneal_strategy="cos"
    )
    rng = np.random.default_rng(seed)
    for step in range(steps):
        pixels, words, boxes = _batch(FIRST_SCENE + step * batch_size, batch_size, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(pixels).last_hidden_state[:, 1:]
            losses = heads.losses(hidden, words, boxes)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, float(loss.detach()))
        if (step + 1) % 1000 == 0:
            parts = " ".join(f"{name} {float(x.detach()):.3f}" for name, x in losses.items())
            log.info("vision %d/%d %s", step + 1, steps, parts)
    model.eval()
    quality = _quality(model, heads)
    log.info("vision quality at the end %s", quality)
    model.save_pretrained(out)
    write_preprocessor(out)
    record = {"seed": seed, "steps": steps, "batch_size": batch_size, "patch_accuracy": quality}
    (out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")


def write_preprocessor(out: Path) -> None:
    """Write the image statistics as Hugging Face image processors do."""
    spec = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
        "do_normalize": True, "do_rescale": True, "do_convert_rgb": True, "resample": 3,
        "size": {"shortest_edge": VIEW}, "crop_size": {"height": VIEW, "width": VIEW},
        "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(spec, indent=1) + "\n")


def _sine_positions(model: Any) -> None:
    """2-D sine-cosine positions: with random ones the place of a patch is not found for long."""
    import torch

    table = model.get_parameter(
        next(name for name, _ in model.named_parameters() if "position_embedding" in name)
    )
    width = table.shape[1] // 4
    frequency = 1.0 / 100 ** (torch.arange(width) / width)
    rows = torch.arange(GRID)[:, None] * frequency
    wave = torch.cat([rows.sin(), rows.cos()], dim=1)
    grid = torch.cat(
        [wave[:, None].expand(-1, GRID, -1), wave[None].expand(GRID, -1, -1)], dim=2
    ).reshape(GRID * GRID, -1)
    with torch.no_grad():
        table[1:] = 0.5 * grid


def _batch(
    first: int, count: int, rng: np.random.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float[B, 3, 96, 96], int[B, 36, groups], float[B, 36, 4]: `count` scenes from `first` on."""
    import torch

    scenes = [random_scene(first + index) for index in range(count)]
    targets = [region_targets(scene) for scene in scenes]
    pixels = np.stack([view(render(scene), rng) for scene in scenes])
    words = np.stack([words for words, _ in targets])
    boxes = np.stack([boxes for _, boxes in targets])
    return torch.from_numpy(pixels), torch.from_numpy(words), torch.from_numpy(boxes)


class _Heads:
    """One linear head that scores all words of all groups, and one for boxes."""

    def __init__(self, width: int) -> None:
        import torch

        self.sizes = [len(names) for names in GROUPS.values()]
        self.norm = torch.nn.LayerNorm(width)
        self.words = torch.nn.Linear(width, sum(self.sizes))
        self.boxes = torch.nn.Linear(width, 4)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.norm.parameters(), *self.words.parameters(), *self.boxes.parameters()]

    def losses(
        self, hidden: torch.Tensor, words: torch.Tensor, boxes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """float[B, 36, D] -> one loss per group of words, and the box loss."""
        import torch.nn.functional as F

        hidden = self.norm(hidden.float())
        scores = self.words(hidden).float().split(self.sizes, dim=-1)
        losses = {
            group: F.cross_entropy(score.flatten(0, 1), words[..., index].flatten())
            for index, (group, score) in enumerate(zip(GROUPS, scores, strict=True))
        }
        covered = boxes[..., 0] >= 0
        predicted = self.boxes(hidden).float()[covered]
        losses["box"] = 5 * F.smooth_l1_loss(predicted, boxes[covered], beta=0.02)
        return losses


def _quality(model: Any, heads: _Heads) -> dict[str, float]:
    """Accuracy per group on 500 scenes not trained on (attributes: over covered patches)."""
    import torch

    with torch.inference_mode():
        pixels, words, boxes = _batch(FIRST_SCENE - 1000, 500, None)
        hidden = heads.norm(model(pixels).last_hidden_state[:, 1:])
        scores = heads.words(hidden).split(heads.sizes, dim=-1)
        covered = boxes[..., 0] >= 0
        quality = {}
        for index, (group, score) in enumerate(zip(GROUPS, scores, strict=True)):
            right = score.argmax(-1) == words[..., index]
            chosen = covered if group in ("color", "size", "texture", "word", "shape") else None
            counted = right if chosen is None else right[chosen]
            quality[group] = round(float(counted.float().mean()), 4)
        error = (heads.boxes(hidden)[covered] - boxes[covered]).abs().mean()
        quality["box_error_pixels"] = round(float(error) * SIZE, 2)
    return quality


assert CELL * 3 == SIZE and VIEW % PATCH == 0
