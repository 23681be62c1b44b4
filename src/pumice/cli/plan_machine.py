"""The part of `pumice plan` that knows a machine: memory, batch, FLOPs and hours of each stage."""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.cli.output import table
from pumice.core.errors import PumiceError

if TYPE_CHECKING:
    from pumice.data.mixture import Mixture
    from pumice.models.lmm import LMM
    from pumice.recipe.schema import Recipe, Stage
    from pumice.train.plan import Lengths, StageSetting

# Where no data is at hand: captions as of LLaVA's 558K, conversations as of its 665K.
_CAPTIONS, _TALK = (20.0, 8.0, 0.0), (300.0, 250.0, 0.1)
_SAMPLED = 2000
_CHARACTERS_PER_TOKEN = 4
_MEMORY = ("weights", "gradients", "optimizer", "activations", "working")


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that describe machine and data."""

    gpus: str
    gpu: str | None
    utilisation: float
    lengths: tuple[str, ...]
    rows: tuple[str, ...]


def machine_record(recipe: Recipe, lmm: LMM, size: tuple[int, int], asked: Asked) -> dict[str, Any]:
    """Everything that is said of a machine, as plain values."""
    from pumice.models.costs import image_costs
    from pumice.recipe.loss_bands import end_of_healthy_runs
    from pumice.train.machines import read_machine
    from pumice.train.plan import SPARE, Planner

    machine = read_machine(asked.gpus, asked.gpu)
    names = [name for name, _ in recipe.stage_list()]
    given = {name: _lengths(value) for name, value in _by_stage("lengths", asked.lengths, names)}
    counted = {name: _count(value) for name, value in _by_stage("rows", asked.rows, names)}
    (image,) = image_costs(lmm, [size])
    planner = Planner(lmm, image)
    stages = []
    for name, stage in recipe.stage_list():
        measured = None if name in given else _measured(recipe, stage)
        lengths = given.get(name) or (measured[0] if measured else _assumed(recipe, stage))
        rows = counted.get(name) or (measured[1] if measured else _known_rows(recipe, name))
        plan = planner.stage(_setting(name, stage, lmm), machine, lengths, asked.utilisation)
        steps = _steps(stage, rows)
        published = recipe.published and recipe.published.hours.get(name)  # type: ignore[call-overload]
        stages.append({
            "name": name,
            "lengths": asdict(lengths) | {"from": "options" if name in given else
                                          "data" if measured else "assumed"},
            "rows": rows,
            "steps": steps,
            "checkpointing": stage.checkpointing,
            "packing": stage.packing and stage.packing.tokens,
            **asdict(plan),
            "memory": plan.memory._asdict() | {"total": plan.memory.total},
            "hours": None if steps is None else steps * plan.step_seconds / 3600,
            "published_hours": published,
            "loss_at_end": end_of_healthy_runs(recipe, name),
        })  # fmt: skip
    return {
        "recipe": recipe.name,
        "machine": asdict(machine.each) | {"title": machine.title, "gpus": machine.count,
                    "usable_memory": int(machine.each.memory * (1 - SPARE))},
        "utilisation": asked.utilisation,
        "image": {**image._asdict(), "size": list(image.size)},
        "published_hardware": recipe.published.hardware if recipe.published else "",
        "stages": stages,
    }  # fmt: skip


def _by_stage(option: str, texts: tuple[str, ...], names: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise PumiceError(
                f"--{option} is {text!r}; it names a stage of the recipe ({', '.join(names)}), as "
                f"in --{option} {names[-1]}={'100000' if option == 'rows' else '300,250,0.1'}."
            )
        pairs.append((name, value))
    return pairs


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise PumiceError(
            f"--rows is {text!r}; a whole number from 1 is needed, as in tune=100000."
        )
    return int(text)


def _lengths(text: str) -> Lengths:
    from pumice.train.plan import Lengths

    try:
        mean, spread, text_only = map(float, text.split(","))
    except ValueError:
        mean, spread, text_only = 0.0, 0.0, 0.0
    if mean <= 0 or spread < 0 or not 0 <= text_only <= 1:
        raise PumiceError(
            f"--lengths is {text!r}; mean and spread of the tokens of text and the share of "
            f"conversations without an image are needed, as in tune=300,250,0.1."
        )
    return Lengths(mean, spread, text_only)


def _setting(name: str, stage: Stage, lmm: LMM) -> StageSetting:
    from pumice.cli.plan import learning
    from pumice.models.lora import LoraSpec
    from pumice.train.plan import StageSetting

    learns, trained = learning(stage, lmm)
    lora, bits = None, 32
    if stage.lora is not None:
        chosen = stage.lora
        targets = None if chosen.targets is None else tuple(chosen.targets)
        lora = LoraSpec(r=chosen.r, alpha=chosen.alpha, dropout=chosen.dropout, targets=targets)
        bits = {None: 32, "int8": 8, "int4": 4}[chosen.quantize]
    return StageSetting(
        name=name, learns=learns, trained=sum(trained.values()), batch_size=stage.batch_size,
        micro_batch_size=stage.micro_batch_size,
        row_tokens=None if stage.packing is None else stage.packing.tokens,
        max_tokens=stage.max_tokens, group_by_length=stage.group_by_length,
        group_by_modality=stage.group_by_modality, checkpointing=stage.checkpointing,
        lora=lora, base_bits=bits,
    )  # fmt: skip


def _measured(recipe: Recipe, stage: Stage) -> tuple[Lengths, int] | None:
    """Lengths of the stage's own data and its rows an epoch; None where it is not at hand."""
    from pumice.cli.stages import first_stage_spec
    from pumice.data.mixture import Mixture, Part
    from pumice.data.open_source import is_pattern

    if recipe.data is None:
        return None
    root = Path(recipe.data).expanduser()
    name = next(n for n, s in recipe.stage_list() if s is stage)
    spec = first_stage_spec(recipe, name, data=root)
    if any(not entry.path.exists() and not is_pattern(entry.path) for entry in spec.data):
        return None
    mixture = Mixture([Part(e.open(), e.weight, e.cap) for e in spec.data], recipe.seed)
    return _sampled(mixture), len(mixture)


def _sampled(mixture: Mixture) -> Lengths:
    """From characters, as tokenising would need the tokenizer's files."""
    from pumice.train.plan import Lengths

    order = mixture.order(0)
    chosen = random.Random(0).sample(order, min(_SAMPLED, len(order)))
    sizes = [mixture.parts[source].source.size(row) for source, row in chosen]
    tokens = [characters / _CHARACTERS_PER_TOKEN for characters, _ in sizes]
    spread = statistics.pstdev(tokens)
    return Lengths(statistics.fmean(tokens), spread, sum(n == 0 for _, n in sizes) / len(sizes))


def _assumed(recipe: Recipe, stage: Stage) -> Lengths:
    from pumice.train.plan import Lengths

    captions = (stage.template or recipe.model.template) == "plain"
    return Lengths(*(_CAPTIONS if captions else _TALK))


def _known_rows(recipe: Recipe, stage: str) -> int | None:
    return recipe.published.rows.get(stage) if recipe.published else None  # type: ignore[call-overload]


def _steps(stage: Stage, rows: int | None) -> int | None:
    if stage.steps is not None:
        return stage.steps
    return None if rows is None else -(-round((stage.epochs or 1) * rows) // stage.batch_size)


def machine_text(record: dict[str, Any]) -> str:
    """The record in a table with a column for each stage, and what it rests on."""
    from pumice.recipe.loss_bands import told_end

    stages, machine = record["stages"], record["machine"]
    lines: list[tuple[str, ...]] = [
        (f"{record['recipe']} on {machine['title']}", *(s["name"] for s in stages))
    ]
    lines += [
        ("conversations", *(_number(s["rows"]) for s in stages)),
        ("steps", *(_number(s["steps"]) for s in stages)),
        ("positions of a conversation", *(f"{s['positions']:.0f}" for s in stages)),
        ("padding", *(f"{100 * s['padding']:.0f} %" for s in stages)),
        ("checkpointing", *(s["checkpointing"] for s in stages)),
        ("at a time on each GPU", *(_at_a_time(s) for s in stages)),
    ]
    lines += [(f"GiB, {name}", *(_gib(s["memory"][name]) for s in stages)) for name in _MEMORY]
    lines += [
        (
            f"GiB of {_gib(machine['usable_memory'])} usable",
            *(_gib(s["memory"]["total"]) for s in stages),
        ),
        ("fits", *("yes" if s["fits"] else "NO" for s in stages)),
        ("the most that fits", *(_most(s) for s in stages)),
        ("PFLOP a step, needed", *(f"{s['model_flops'] / 1e15:.3g}" for s in stages)),
        ("PFLOP a step, computed", *(f"{s['hardware_flops'] / 1e15:.3g}" for s in stages)),
        ("seconds a step", *(f"{s['step_seconds']:.3g}" for s in stages)),
        ("MFU", *(f"{100 * s['mfu']:.0f} %" for s in stages)),
        ("hours", *(_hours(s["hours"]) for s in stages)),
    ]
    if any(s["published_hours"] for s in stages):
        name = f"hours published ({record['published_hardware']})"
        lines.append((name, *(_hours(s["published_hours"]) for s in stages)))
    lines.append(("loss healthy runs end at", *(told_end(s["loss_at_end"]) for s in stages)))
    return table(_right(lines)) + "\n\n" + "\n".join(_notes(record))


def _right(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (row[0], *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))) for row in rows
    ]


def _notes(record: dict[str, Any]) -> list[str]:
    notes = [
        f"Time: everything computed at {100 * record['utilisation']:.0f} % of peak "
        f"(--utilisation); MFU counts only what the mathematics needs.",
        "Memory: as if every conversation were max_tokens long, with 8 % of the GPU left over.",
    ]
    for stage in record["stages"]:
        lengths = stage["lengths"]
        notes.append(
            f"{stage['name']}: {lengths['mean']:.0f} +- {lengths['spread']:.0f} tokens of text, "
            f"{100 * lengths['text_only']:.0f} % without an image ({lengths['from']})."
        )
        if stage["rows"] is None and stage["steps"] is None:
            notes.append(
                f"{stage['name']}: how many conversations there are is not known here; set "
                f"data=DIR, or --rows {stage['name']}=N, for the hours."
            )
        if not stage["fits"]:
            notes.append(f"{stage['name']}: {_remedy(stage)}")
    return notes


def _remedy(stage: dict[str, Any]) -> str:
    key = f"stages.{stage['name']}"
    if stage["largest"] and stage["packing"]:
        return f"does not fit; {key}.packing.tokens={stage['largest']} does."
    if stage["largest"]:
        return f"does not fit; {key}.micro_batch_size={stage['largest']} does (on every process)."
    if stage["checkpointing"] != "blocks":
        return f"does not fit; try {key}.checkpointing=blocks, more GPUs, or lora."
    return "does not fit; more GPUs, a shorter max_tokens, or lora with quantize are needed."


def _at_a_time(stage: dict[str, Any]) -> str:
    if stage["packing"]:
        return f"{stage['packing']:,} tokens"
    return f"{stage['micro']}"


def _most(stage: dict[str, Any]) -> str:
    if stage["largest"] is None:
        return "-"
    return f"{stage['largest']:,} tokens" if stage["packing"] else f"{stage['largest']}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _gib(value: int) -> str:
    return f"{value / 2**30:.1f}"


def _hours(value: float | None) -> str:
    return "?" if value is None else f"{value:.2g}" if value < 1 else f"{value:.1f}"
