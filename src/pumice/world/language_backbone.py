"""The pocket language model: a small Llama that learns look-up from text before it meets images.

The text of a scene is written at 36 positions, one per patch of the vision backbone; what is said
at a position is the sum of its words' embeddings ("top", "left", "large", "red", "circle"), with
words dropped and noise added. Statements with the key directly before the answer come first
(cloze), then dialogues. No pixels are involved. `docs/pocket.md` says what this makes easy.
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.world import language
from pumice.world.scenes import COLUMNS, ROWS, Scene, random_scene
from pumice.world.tokenizer import train_tokenizer
from pumice.world.vision_backbone import FIRST_SCENE, GRID, patch_owner

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PATCHES = GRID * GRID
TEXT_TOKENS = 100
WARMUP = 600
PEAK_RATE = 1.5e-3
DROPPED_WORDS = 0.06
QUESTION_WEIGHT = 0.1
BRIEFLY = ("Answer briefly.", "Give a short answer.")


@dataclass(slots=True)
class Draft:
    """A sequence in the making: pieces of text with their loss weight; None is the scene."""

    scene: Scene | None
    pieces: list[tuple[str | None, float]] = field(default_factory=list)

    def say(self, text: str | None, weight: float = QUESTION_WEIGHT) -> None:
        self.pieces.append((text, weight))


def scene_words(scene: Scene, rng: random.Random | None) -> list[list[str]]:
    """The words at each of the 36 positions; `rng` drops some of them."""
    owner = patch_owner(scene)
    positions = []
    for patch in range(PATCHES):
        row, column = divmod(patch, GRID)
        words = [ROWS[row // 2], COLUMNS[column // 2]]
        if owner[row, column] < 0:
            words.append(scene.background)
        else:
            thing = scene.things[owner[row, column]]
            words += (
                ["sign", thing.word] if thing.is_sign
                else [thing.size, thing.texture, thing.color, thing.shape]
            )  # fmt: skip
        if rng is not None:
            words = [word for word in words if rng.random() > DROPPED_WORDS] or words[:1]
        positions.append(words)
    return positions


def cloze(scene: Scene, rng: random.Random) -> Draft:
    """Statements with the key directly before the answer: 'color circle red . where star top'."""
    facts: list[tuple[str, str]] = [("background", scene.background)]
    for thing in scene.things:
        name = "sign" if thing.is_sign else thing.shape
        facts += [("where " + name, thing.place), (thing.place, name)]
        if thing.is_sign:
            facts.append(("sign", thing.word))
        else:
            facts += [
                ("color " + name, thing.color),
                ("size " + name, thing.size),
                ("pattern " + name, thing.texture),
            ]
    for values in zip(*[(t.color, t.texture, t.size) for t in scene.shapes], strict=True):
        facts += [("number " + value, str(values.count(value))) for value in set(values)]
    facts.append(("shapes", str(len(scene.shapes))))
    rng.shuffle(facts)
    draft = Draft(scene)
    draft.say(None)
    for key, answer in facts:
        draft.say(key)
        draft.say(answer, 1.0)
        draft.say(".", 0.0)
    return draft


def dialogue(scene: Scene, rng: random.Random) -> Draft:
    """A conversation about the scene in the form the tune stage uses."""
    draft = Draft(scene)
    draft.say("USER: ", 0.0)
    draft.say(None)
    turns = _turns(scene, rng)
    for index, (question, answer) in enumerate(turns):
        lead = "\n" if index == 0 else "USER: "
        draft.say(f"{lead}{question} ASSISTANT:")
        draft.say(answer, 1.0)
        draft.say("</s>", 1.0)
    return draft


def _turns(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    if rng.random() < 0.12:
        return [(rng.choice(("Describe the image in detail.", "What do you see in the image?")),
                 language.description(scene, rng))]  # fmt: skip
    turns = []
    for question in language.questions(scene, 7, rng):
        draw = rng.random()
        if draw < 0.3 and question.kind in language.CHOICE_KINDS:
            options, letter = language.choices(question, rng)
            lines = "\n".join(
                f"{name}. {option}" for name, option in zip("ABCD", options, strict=False)
            )
            turns.append((f"{question.text}\n{lines}\n{rng.choice(BRIEFLY)}", letter))
        elif draw < 0.6:
            turns.append((f"{question.text} {rng.choice(BRIEFLY)}", question.short))
        else:
            turns.append((question.text, question.long))
    if rng.random() < 0.25:
        turns.insert(rng.randrange(len(turns)), language.reasoning(scene, rng))
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        thing = rng.choice(scene.things)
        box, name = language.box_text(thing), language.thing_phrase(thing)
        phrase = rng.choice((name, thing.shape))
        pair = (
            (f"What is in the box {box}?", name)
            if rng.random() < 0.4
            else (f"Give the box of the {phrase}.", box)
        )
        turns.insert(rng.randrange(len(turns) + 1), pair)
    return turns


def in_words(scene: Scene, rng: random.Random) -> Draft:
    """The same scene told in ordinary words, then one or two questions."""
    draft = Draft(None)
    told = language.description(scene, rng) if rng.random() < 0.5 else language.caption(scene, rng)
    for index, question in enumerate(language.questions(scene, 2, rng)):
        draft.say(f"USER: {told + ' ' if index == 0 else ''}{question.text} ASSISTANT:")
        draft.say(question.long, 1.0)
        draft.say("</s>", 1.0)
    return draft


def text_only(rng: random.Random) -> Draft:
    """A dialogue without any scene."""
    draft = Draft(None)
    for question, answer in language.text_dialogue(rng):
        draft.say(f"USER: {question} ASSISTANT:")
        draft.say(answer, 1.0)
        draft.say("</s>", 1.0)
    return draft


def plain_caption(scene: Scene, rng: random.Random) -> Draft:
    """Scene, caption, line break: the form the align stage uses."""
    draft = Draft(scene)
    draft.say(None)
    draft.say(language.caption(scene, rng), 1.0)
    return draft


def draft_for(step: int, warmup: int, scene: Scene, rng: random.Random) -> Draft:
    """What is learnt from this scene at this step: cloze alone at first, then the mixture."""
    draw = rng.random()
    if step < warmup or draw < 0.14:
        return cloze(scene, rng)
    if draw < 0.80:
        return dialogue(scene, rng)
    if draw < 0.90:
        return plain_caption(scene, rng)
    return in_words(scene, rng) if draw < 0.97 else text_only(rng)


class Scribe:
    """Turns drafts into tensors."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        words = [tokenizer(word, add_special_tokens=False).input_ids for word in _bag_vocabulary()]
        if any(len(ids) != 1 for ids in words):
            raise AssertionError("every word of a scene must be one token")
        self.word_id = {word: ids[0] for word, ids in zip(_bag_vocabulary(), words, strict=True)}

    def batch(self, drafts: list[Draft], rng: random.Random) -> tuple[torch.Tensor, ...]:
        """ids long[B, T] (-1: scene), weights float[B, T], bags long[B, 36, 6] (-1: no word)."""
        import torch

        texts = [text for draft in drafts for text, _ in draft.pieces if text is not None]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False).input_ids)
        rows = [self._row(draft, encoded) for draft in drafts]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        weights = torch.zeros(len(rows), length)
        bags = torch.full((len(rows), PATCHES, 6), -1, dtype=torch.long)
        for index, (row_ids, row_weights) in enumerate(rows):
            ids[index, : len(row_ids)] = torch.tensor(row_ids)
            weights[index, : len(row_weights)] = torch.tensor(row_weights)
            scene = drafts[index].scene
            if scene is not None:
                for patch, words in enumerate(scene_words(scene, rng)):
                    known = [self.word_id[word] for word in words]
                    bags[index, patch, : len(known)] = torch.tensor(known)
        return ids, weights, bags

    def _row(self, draft: Draft, encoded: Any) -> tuple[list[int], list[float]]:
        """Ids and weights; pieces past the token budget are left out together with their turn."""
        ids, weights = [self.tokenizer.bos_token_id], [0.0]
        complete = len(ids)
        for text, weight in draft.pieces:
            if text is None:
                ids += [-1] * PATCHES
                weights += [0.0] * PATCHES
            else:
                piece = next(encoded)
                ids += piece
                weights += [weight] * len(piece)
            budget = TEXT_TOKENS + (PATCHES if draft.scene is not None else 0)
            if text in (None, "</s>", ".") and len(ids) <= budget:
                complete = len(ids)
        return (ids, weights) if text not in ("</s>", ".") else (ids[:complete], weights[:complete])


def _bag_vocabulary() -> tuple[str, ...]:
    from pumice.world import scenes

    names = (*scenes.ROWS, *scenes.COLUMNS, *scenes.BACKGROUNDS, *scenes.SIZES, *scenes.TEXTURES,
             *scenes.COLORS, *scenes.SHAPES, *scenes.WORDS, "sign")  # fmt: skip
    return tuple(dict.fromkeys(names))


def embed(model: Any, ids: torch.Tensor, bags: torch.Tensor, noise: float) -> torch.Tensor:
    """long[B, T], long[B, 36, 6] -> float[B, T, D]: word embeddings, their sums in the scene."""
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


def train_language(out: Path, *, steps: int = 8000, batch_size: int = 16, seed: int = 0) -> None:
    """Train the language model from nothing and write it to `out` with `quality.json`."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoTokenizer

    train_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    scribe = Scribe(tokenizer)
    model = new_model(len(tokenizer), seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=0.02, anneal_strategy="cos"
    )
    rng = random.Random(f"language {seed}")
    running = 0.0
    for step in range(steps):
        first = FIRST_SCENE + step * batch_size
        drafts = [draft_for(step, WARMUP, random_scene(first + k), rng) for k in range(batch_size)]
        ids, weights, bags = scribe.batch(drafts, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeds = embed(model, ids, bags, noise=0.4 * rng.random())
            hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            keep = weights[:, 1:] > 0
            logits = model.lm_head(hidden[:, :-1][keep]).float()
        losses = F.cross_entropy(logits, ids[:, 1:][keep], reduction="none")
        loss = (losses * weights[:, 1:][keep]).sum() / weights[:, 1:][keep].sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = (
            float(loss.detach()) if step == 0 else 0.98 * running + 0.02 * float(loss.detach())
        )
        if step % 100 == 0:
            log.info("language %d/%d loss %.4f", step, steps, running)
        if step % 1000 == 999 or step == steps - 1:
            quality = look_up(model, scribe, 60)
            log.info("language %d look-up %s", step, quality)
            model.save_pretrained(out)
    quality = look_up(model, scribe, 300)
    log.info("language look-up at the end %s", quality)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {"seed": seed, "steps": steps, "batch_size": batch_size, "look_up": quality}
    (out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")


def look_up(model: Any, scribe: Scribe, scenes: int) -> dict[str, float]:
    """Share of short answers right per kind, teacher-forced, on scenes not trained on."""
    import torch

    model.eval()
    rng = random.Random(5)
    scores = {}
    for kind in (*language.KINDS, "choice"):
        right, asked = 0, 0
        drafts, truths = [], []
        for index in range(scenes):
            scene = random_scene(FIRST_SCENE - 2000 + index)
            found = language.ask(
                scene, rng.choice(language.CHOICE_KINDS) if kind == "choice" else kind, rng
            )
            if found is None:
                continue
            text, answer = found.text, found.short
            if kind == "choice":
                options, answer = language.choices(found, rng)
                text += (
                    "\n"
                    + "\n".join(f"{n}. {o}" for n, o in zip("ABCD", options, strict=False))
                    + "\n"
                )
            draft = Draft(scene)
            draft.say("USER: ", 0.0)
            draft.say(None)
            draft.say(f"\n{text}{'' if kind == 'choice' else ' '}Answer briefly. ASSISTANT:", 0.0)
            draft.say(answer, 1.0)
            draft.say("</s>", 1.0)
            drafts.append(draft)
            truths.append(answer)
        with torch.inference_mode():
            ids, weights, bags = scribe.batch(drafts, rng)
            logits = model(inputs_embeds=embed(model, ids, bags, 0.0), use_cache=False).logits
            wrong = (logits[:, :-1].argmax(-1) != ids[:, 1:]) & (weights[:, 1:] > 0)
            right, asked = int((~wrong.any(1)).sum()), len(truths)
        scores[kind] = round(right / max(asked, 1), 3)
    model.train()
    return scores
