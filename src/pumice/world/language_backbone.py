"""The pocket language model: a small Llama that learns look-up from text before it meets images.

The text of a scene is written at 36 positions, one per patch of the vision backbone; what is said
at a position is the sum of its words' embeddings ("top", "left", "large", "red", "circle"), with
words dropped and noise added. Statements with the key directly before the answer come first
(cloze), then dialogues. No pixels are involved. `docs/pocket.md` says what this makes easy.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.core.log import get_logger
from pumice.world import language
from pumice.world.lessons import (
    HARD_KINDS,
    LATE_KINDS,
    ROW_END,
    TILED,
    WHOLE,
    Draft,
    Lesson,
    Sight,
    mixture,
    practice_mixture,
)
from pumice.world.scenes import random_scene
from pumice.world.tokenizer import train_tokenizer
from pumice.world.vision_backbone import FIRST_SCENE

if TYPE_CHECKING:
    import torch

log = get_logger(__name__)

TEXT_TOKENS = 100
PEAK_RATE = 1.5e-3
# The shares of the steps at which a cycle of the learning rate ends and the next begins.
CYCLES = (7 / 13, 10 / 13)
SAVE_EVERY = 1000
# The pieces of text that end a turn or a statement.
ENDS = ("</s>", ".")


class Scribe:
    """Turns drafts into tensors."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        words = [tokenizer(word, add_special_tokens=False).input_ids for word in _bag_vocabulary()]
        if any(len(ids) != 1 for ids in words):
            raise AssertionError("every word of a scene must be one token")
        self.word_id = {word: ids[0] for word, ids in zip(_bag_vocabulary(), words, strict=True)}
        # Behind a letter, for at the front of a text the tokenizer puts a mark between words.
        self.word_id[ROW_END] = tokenizer("a" + ROW_END, add_special_tokens=False).input_ids[-1]

    def batch(
        self, drafts: list[Draft], rng: random.Random, sight: Sight = WHOLE
    ) -> tuple[torch.Tensor, ...]:
        """ids long[B, T] (-1: scene), weights float[B, T], bags long[B, n, 6] (-1: no word)."""
        import torch

        texts = [text for draft in drafts for text, _ in draft.pieces if text is not None]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False).input_ids)
        rows = [self._row(draft, encoded, sight.positions) for draft in drafts]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        weights = torch.zeros(len(rows), length)
        bags = torch.full((len(rows), sight.positions, 6), -1, dtype=torch.long)
        for index, (row_ids, row_weights) in enumerate(rows):
            ids[index, : len(row_ids)] = torch.tensor(row_ids)
            weights[index, : len(row_weights)] = torch.tensor(row_weights)
            scene = drafts[index].scene
            if scene is not None:
                for patch, words in enumerate(sight.words(scene, rng)):
                    known = [self.word_id[word] for word in words]
                    bags[index, patch, : len(known)] = torch.tensor(known)
        return ids, weights, bags

    def _row(self, draft: Draft, encoded: Any, positions: int) -> tuple[list[int], list[float]]:
        """Ids and weights; turns or statements that do not end within the budget are left out.

        A draft that is no row of turns or statements (a caption) is kept whole.
        """
        budget = TEXT_TOKENS + (positions if draft.scene is not None else 0)
        ids, weights = [self.tokenizer.bos_token_id], [0.0]
        complete = len(ids)
        for text, weight in draft.pieces:
            piece = [-1] * positions if text is None else next(encoded)
            ids += piece
            weights += [0.0 if text is None else weight] * len(piece)
            if (text is None or text in ENDS) and len(ids) <= budget:
                complete = len(ids)
        last_text, _ = draft.pieces[-1]
        kept = complete if last_text in ENDS else len(ids)
        return ids[:kept], weights[:kept]


def _bag_vocabulary() -> tuple[str, ...]:
    from pumice.world import scenes

    names = (*scenes.ROWS, *scenes.COLUMNS, *scenes.BACKGROUNDS, *scenes.SIZES, *scenes.TEXTURES,
             *scenes.COLORS, *scenes.SHAPES, *scenes.WORDS, "sign")  # fmt: skip
    return tuple(dict.fromkeys(names))


def embed(model: Any, ids: torch.Tensor, bags: torch.Tensor, noise: float) -> torch.Tensor:
    """long[B, T], long[B, n, 6] -> float[B, T, D]: word embeddings, their sums in the scene."""
    import torch

    table = model.get_input_embeddings()
    embeds = table(ids.clamp(min=0))
    summed = (table(bags.clamp(min=0)) * (bags >= 0).unsqueeze(-1)).sum(2)
    if noise:
        summed = summed + noise * table.weight.detach().std() * torch.randn_like(summed)
    rows = (ids == -1).any(1)
    embeds = embeds.masked_scatter((ids == -1).unsqueeze(-1), summed[rows].to(embeds.dtype))
    return embeds  # type: ignore[no-any-return]


def new_model(vocabulary: int, seed: int) -> Any:
    """A Llama of 1.2 M parameters; q and k start larger, which shortens the look-up plateau."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        # Measured: with the usual 0.02 and theta 1000 there is no look-up after 1300 steps; with
        # these it begins within 200.
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(1.7)
    return model


def train_language(
    out: Path,
    *,
    steps: int = 13000,
    batch_size: int = 16,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train the language model from nothing and write it to `out` with `quality.json`.

    `report` hears the number of steps done and the smoothed loss after every step.
    """
    from transformers import AutoTokenizer

    train_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    scribe = Scribe(tokenizer)
    model = new_model(len(tokenizer), seed)
    for cycle in cycles(steps):
        _cycle(model, scribe, cycle, batch_size, seed, out, report)
    quality = look_up(model, scribe, 300)
    tiled = look_up(model, scribe, 300, TILED)
    log.info("language look-up at the end %s, in tiles %s", quality, tiled)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {"seed": seed, "steps": steps, "batch_size": batch_size, "look_up": quality,
              "look_up_in_tiles": tiled}  # fmt: skip
    (out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Cycle:
    """One cycle of the learning rate: which steps, what they teach, how many of them in tiles."""

    lesson: Lesson
    steps: range
    tiled: float = 0.0


def cycles(steps: int) -> tuple[Cycle, ...]:
    """Everything; then practice of the hard questions; then the same, with wide scenes in tiles."""
    first, second = (round(steps * share) for share in CYCLES)
    return (
        Cycle(mixture, range(first)),
        Cycle(practice_mixture(HARD_KINDS), range(first, second)),
        Cycle(practice_mixture(LATE_KINDS, describe=0.1), range(second, steps), tiled=0.25),
    )


def _cycle(
    model: Any,
    scribe: Scribe,
    cycle: Cycle,
    batch_size: int,
    seed: int,
    out: Path,
    report: Callable[[int, float], None] | None,
) -> None:
    """One cycle of the learning rate over one kind of lesson; the model is saved now and then."""
    import torch

    steps = cycle.steps
    if steps.start:
        torch.manual_seed(seed + steps.start)
    rng = random.Random(f"language {seed}" + (f" from {steps.start}" if steps.start else ""))
    optimizer, schedule = _optimizer(model, len(steps))
    smoothed = None
    for step in steps:
        sight = TILED if cycle.tiled and rng.random() < cycle.tiled else WHOLE
        loss = lesson_loss(model, scribe, cycle.lesson, step, batch_size, rng, sight)
        _learn(model, loss, optimizer)
        schedule.step()
        value = float(loss.detach())
        smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
        if report is not None:
            report(step + 1, smoothed)
        if (step + 1) % SAVE_EVERY == 0:
            quality = look_up(model, scribe, 60)
            log.info("language %d loss %.4f look-up %s", step + 1, smoothed, quality)
            model.save_pretrained(out)


def _optimizer(model: Any, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=0.02, anneal_strategy="cos"
    )
    return optimizer, schedule


def lesson_loss(
    model: Any,
    scribe: Scribe,
    lesson: Lesson,
    step: int,
    batch_size: int,
    rng: random.Random,
    sight: Sight = WHOLE,
) -> torch.Tensor:
    """float[]: the weighted mean cross entropy over the drafts of a step."""
    import torch
    import torch.nn.functional as F

    first = FIRST_SCENE + step * batch_size
    drafts = [lesson(step, random_scene(first + k), rng) for k in range(batch_size)]
    ids, weights, bags = scribe.batch(drafts, rng, sight)
    keep = weights[:, 1:] > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds = embed(model, ids, bags, noise=0.4 * rng.random())
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][keep]).float()
    losses = F.cross_entropy(logits, ids[:, 1:][keep], reduction="none")
    kept_weights = weights[:, 1:][keep]
    return (losses * kept_weights).sum() / kept_weights.sum()


def _learn(model: Any, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    import torch

    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def look_up(model: Any, scribe: Scribe, scenes: int, sight: Sight = WHOLE) -> dict[str, float]:
    """Share of short answers right per kind, teacher-forced, on scenes not trained on."""
    model.eval()
    rng = random.Random(5)
    scores = {}
    for kind in (*language.KINDS, "choice"):
        drafts = _exam(kind, scenes, rng)
        right = _answered_right(model, scribe, drafts, rng, sight)
        scores[kind] = round(right / max(len(drafts), 1), 3)
    model.train()
    return scores


def _exam(kind: str, scenes: int, rng: random.Random) -> list[Draft]:
    """One question of a kind per scene, where the scene has one; its answer alone has weight."""
    drafts = []
    for index in range(scenes):
        scene = random_scene(FIRST_SCENE - 2000 + index)
        choice = kind == "choice"
        asked = rng.choice(language.CHOICE_KINDS) if choice else kind
        question = language.ask(scene, asked, rng)
        if question is None:
            continue
        text, answer = f"{question.text} ", question.short
        if choice:
            options, answer = language.choices(question, rng)
            lines = (f"{name}. {option}" for name, option in zip("ABCD", options, strict=False))
            text = "\n".join((question.text, *lines, ""))
        draft = Draft(scene)
        draft.say("USER: ", 0.0)
        draft.say(None)
        draft.say(f"\n{text}Answer briefly. ASSISTANT:", 0.0)
        draft.say(answer, 1.0)
        draft.say("</s>", 1.0)
        drafts.append(draft)
    return drafts


def _answered_right(
    model: Any, scribe: Scribe, drafts: list[Draft], rng: random.Random, sight: Sight
) -> int:
    """How many drafts have every weighted token as the likeliest one."""
    import torch

    with torch.inference_mode():
        ids, weights, bags = scribe.batch(drafts, rng, sight)
        logits = model(inputs_embeds=embed(model, ids, bags, 0.0), use_cache=False).logits
        wrong = (logits[:, :-1].argmax(-1) != ids[:, 1:]) & (weights[:, 1:] > 0)
    return int((~wrong.any(1)).sum())
