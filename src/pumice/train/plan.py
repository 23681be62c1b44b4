"""What a stage will take on a machine: memory of each accelerator, FLOPs, time, and what fits.

Nothing is loaded: memory comes from `models.simulate`, FLOPs from `models.costs`, lengths from the
data where it is there, else from a stated assumption. With several accelerators everything but a
frozen vision backbone is sharded (FSDP2): float32 weights, gradients and optimizer states in equal
parts, the weights of two blocks at a time in bfloat16, what is outside blocks whole in float32.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pumice.core.errors import PumiceError
from pumice.data.loader import WINDOW
from pumice.models.costs import (
    Counts,
    ImageCost,
    Trained,
    gated_flops,
    language_flops,
    num_parameters,
    training_flops,
)
from pumice.models.recompute import block_lists, recompute_every
from pumice.models.simulate import Setting, StepMemory, Work, step_memory

if TYPE_CHECKING:
    from torch import nn

    from pumice.models.lmm import LMM
    from pumice.models.lora import LoraSpec
    from pumice.train.machines import Machine

# float32 weights, gradients and two states of AdamW.
_WEIGHT, _GRADIENT, _STATES, _HALF = 4, 4, 8, 2
# AdamW reads all of them and writes all but the gradient.
_UPDATE = 28
# Left for the driver, kernels' workspace and fragmentation.
SPARE = 0.08
_DRAWN = 4096
_SHORTEST = 8
_SUPERVISED = 0.6


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of text of conversations, normally distributed, and the share that lacks images."""

    mean: float
    spread: float
    text_only: float

    def drawn(self, longest: int, image_tokens: int) -> list[tuple[int, bool]]:
        """(tokens of text, shows an image), always the same; none is longer than `longest`."""
        rng, rows = random.Random(0), []
        for _ in range(_DRAWN):
            shown = rng.random() >= self.text_only
            most = longest - image_tokens * shown
            text = max(_SHORTEST, min(most, round(rng.gauss(self.mean, self.spread))))
            rows.append((text, shown))
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSetting:
    """What of a stage decides its cost."""

    name: str
    learns: Trained
    trained: int
    """Weights that learn."""
    batch_size: int
    micro_batch_size: int | None
    row_tokens: int | None
    """Of a packed row; None where conversations are padded."""
    max_tokens: int
    group_by_length: bool
    group_by_modality: bool
    checkpointing: str
    lora: LoraSpec | None = None
    base_bits: int = 32
    """How the frozen language model under adapters is held."""


class Memory(NamedTuple):
    """Bytes on each accelerator, at the moment of the most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    """What forward and backward pass need beside them: a block's weights, logits, gradients."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The answer for one stage. FLOPs are of one step on all accelerators."""

    micro: int
    """Conversations at a time on each accelerator; with packing 1, a row."""
    pieces: float
    """Micro-batches of a step on each."""
    memory: Memory
    fits: bool
    largest: int | None
    """The largest micro-batch that fits, or tokens of a packed row; None if none does."""
    padding: float
    positions: float
    """Mean length of a conversation."""
    model_flops: float
    """What the mathematics needs: no padding, nothing computed twice."""
    hardware_flops: float
    compute_seconds: float
    exchange_seconds: float
    step_seconds: float
    mfu: float
    """Model FLOPs of the accelerators' peak that this is."""


class Planner:
    """The costs of one model, for any stage and machine."""

    def __init__(self, lmm: LMM, image: ImageCost) -> None:
        self.lmm, self.config, self.image = lmm, lmm.config, image
        few, many = 64, 128
        low, high = (language_flops(lmm, n) for n in (few, many))
        # FLOPs of n positions are a n + b n^2.
        self.square = (high / many - low / few) / (many - few)
        self.linear = low / few - self.square * few
        self.head = 2 * lmm.language.hidden_size * lmm.language.vocab_size
        self.gated = gated_flops(lmm, many, image.latents) / many
        self._memories: dict[tuple[Work, Setting], StepMemory] = {}

    def stage(
        self, stage: StageSetting, machine: Machine, lengths: Lengths, utilisation: float
    ) -> StagePlan:
        """The plan, at `utilisation` of the peak for everything that is computed."""
        share = self._share(stage, machine)
        micro = 1 if stage.row_tokens is not None else stage.micro_batch_size or share
        memory = self.memory(stage, machine, micro, pieces=share > micro)
        rows = lengths.drawn(stage.max_tokens, self.image.tokens)
        real = [(text + self.image.tokens * shown, text, shown) for text, shown in rows]
        executed = self._padded(stage, real, micro)
        scale = stage.batch_size / len(real)
        model = scale * sum(self._flops(stage, n, text, shown) for n, text, shown in real)
        hardware = scale * sum(
            self._flops(stage, n, text, shown, twice=True) for n, text, shown in executed
        )
        positions = sum(n for n, _, _ in real) / len(real)
        pieces = share / micro
        if stage.row_tokens is not None:
            pieces = max(1.0, share * positions / stage.row_tokens)
        each = machine.each
        compute = hardware / (machine.count * each.flops * utilisation)
        exchange = pieces * self._exchanged(stage, machine) / each.link
        update = _UPDATE * stage.trained / machine.count / each.bandwidth
        seconds = max(compute, exchange) + update
        room = int(each.memory * (1 - SPARE))
        return StagePlan(
            micro=micro,
            pieces=pieces,
            memory=memory,
            fits=memory.total <= room,
            largest=self._largest(stage, machine, share, room),
            padding=1 - sum(n for n, _, _ in real) / sum(n for n, _, _ in executed),
            positions=positions,
            model_flops=model,
            hardware_flops=hardware,
            compute_seconds=compute,
            exchange_seconds=exchange,
            step_seconds=seconds,
            mfu=model / (seconds * machine.count * each.flops),
        )

    def memory(self, stage: StageSetting, machine: Machine, micro: int, *, pieces: bool) -> Memory:
        """Of a micro-batch in which every conversation is as long as the stage allows."""
        sharded = machine.count > 1
        setting = Setting(
            stage.learns, mixed=True, sharded=sharded, accumulates=pieces and not sharded,
            checkpointing=stage.checkpointing, lora=stage.lora,
        )  # fmt: skip
        if stage.row_tokens is not None:
            step = self._simulated(self._packed_work(stage, stage.row_tokens), setting)
        elif micro <= 2:
            step = self._simulated(self._padded_work(stage, micro), setting)
        else:
            # Rows are computed side by side: what more of them take is in proportion.
            one, two = (self._simulated(self._padded_work(stage, n), setting) for n in (1, 2))
            step = StepMemory(*(a + (micro - 1) * (b - a) for a, b in zip(
                (one.activations, one.peak), (two.activations, two.peak), strict=True
            )))  # fmt: skip
        return self._sum(stage, machine, step)

    def _sum(self, stage: StageSetting, machine: Machine, step: StepMemory) -> Memory:
        everything, vision = num_parameters(self.lmm), num_parameters(self.lmm.vision)
        adapters = stage.trained if stage.learns.adapters else 0
        held = self._held(stage, everything) + _WEIGHT * adapters
        states = _STATES * stage.trained
        if machine.count == 1:
            gradients = _GRADIENT * stage.trained
            working = max(0, step.peak - step.activations - gradients)
            return Memory(held, gradients, states, step.activations, working)
        whole = 0 if stage.learns.vision else _WEIGHT * vision
        count = machine.count
        working = max(0, step.peak - step.activations) + self._gathered()
        return Memory(
            whole + (held - whole) // count,
            _GRADIENT * stage.trained // count,
            states // count,
            step.activations,
            working,
        )

    def _held(self, stage: StageSetting, everything: int) -> int:
        language = num_parameters(self.lmm.language)
        return _WEIGHT * (everything - language) + language * stage.base_bits // 8

    def _gathered(self) -> int:
        """Weights that are whole at a time: two blocks, and what stands before and behind them."""
        blocks = next(block_lists(self.lmm))
        return _HALF * 2 * num_parameters(blocks[0]) + _WEIGHT * self._outside(blocks)

    def _outside(self, blocks: nn.Module) -> int:
        """Weights of embeddings, head and connector, which are gathered in float32."""
        everything = num_parameters(self.lmm) - num_parameters(self.lmm.vision)
        return everything - num_parameters(blocks)

    def _exchanged(self, stage: StageSetting, machine: Machine) -> float:
        """Bytes an accelerator takes in for one micro-batch: weights twice, gradients once."""
        if machine.count == 1:
            return 0.0
        blocks = next(block_lists(self.lmm))
        halved = num_parameters(blocks)
        if stage.learns.vision:
            halved += num_parameters(self.lmm.vision)
        away = (machine.count - 1) / machine.count
        weights = 2 * _HALF * halved + _WEIGHT * self._outside(blocks)
        return away * (weights + _GRADIENT * stage.trained)

    def _share(self, stage: StageSetting, machine: Machine) -> int:
        if stage.batch_size % machine.count:
            raise PumiceError(
                f"stages.{stage.name}.batch_size is {stage.batch_size} for {machine.title}; each "
                f"takes an equal share. Give a multiple of {machine.count}, or other --gpus."
            )
        return stage.batch_size // machine.count

    def _simulated(self, work: Work, setting: Setting) -> StepMemory:
        key = (work, setting)
        if key not in self._memories:
            self._memories[key] = step_memory(self.config, work, setting)
        return self._memories[key]

    def _padded_work(self, stage: StageSetting, rows: int) -> Work:
        image, longest = self.image, stage.max_tokens
        learnt = max(1, rows * round(_SUPERVISED * (longest - image.tokens)))
        return Work(rows, longest, rows * image.views, rows * image.tokens, learnt)

    def _packed_work(self, stage: StageSetting, tokens: int) -> Work:
        """A row of short conversations holds the most images, which is the most work."""
        each = min(tokens, max(2 * self.image.tokens, self.image.tokens + 2 * _SHORTEST))
        many = max(1, tokens // each)
        documents = (*[each] * (many - 1), tokens - each * (many - 1))
        learnt = max(1, round(_SUPERVISED * (tokens - many * self.image.tokens)))
        return Work(1, tokens, many * self.image.views, many * self.image.tokens, learnt, documents)

    def _largest(self, stage: StageSetting, machine: Machine, share: int, room: int) -> int | None:
        if stage.row_tokens is not None:
            # Memory of a row grows with its tokens: from what one takes.
            memory = self.memory(stage, machine, 1, pieces=True)
            fixed = memory.weights + memory.gradients + memory.optimizer + memory.working
            tokens = int((room - fixed) / max(1, memory.activations) * stage.row_tokens)
            return tokens // 256 * 256 if tokens >= stage.max_tokens else None
        for micro in range(share, 0, -1):
            if share % micro == 0:
                pieces = micro < share
                if self.memory(stage, machine, micro, pieces=pieces).total <= room:
                    return micro
        return None

    def _padded(
        self, stage: StageSetting, rows: Sequence[tuple[int, int, bool]], micro: int
    ) -> list[tuple[int, int, bool]]:
        """Each conversation as long as it is computed: as the longest beside it, or as it is."""
        if stage.row_tokens is not None:
            return list(rows)
        kinds = [list(rows)]
        if stage.group_by_modality:
            kinds = [[row for row in rows if row[2] is shown] for shown in (True, False)]
        padded = []
        for kind in kinds:
            if stage.group_by_length:
                size = WINDOW * stage.batch_size
                kind = [r for i in range(0, len(kind), size) for r in sorted(kind[i : i + size])]
            for start in range(0, len(kind), micro):
                beside = kind[start : start + micro]
                longest = max(row[0] for row in beside)
                padded += [(longest, text, shown) for _, text, shown in beside]
        return padded

    def _flops(
        self, stage: StageSetting, positions: int, text: int, shown: bool, *, twice: bool = False
    ) -> float:
        """One conversation forward and backward; `twice` with blocks that are computed again."""
        learnt = _SUPERVISED * text
        blocks = (self.linear - self.head) * positions + self.square * positions**2
        counts = Counts(
            self.image.vision_flops * shown,
            self.image.connector_flops * shown,
            int(self.gated * positions),
            int(blocks + self.head * learnt),
        )
        total: float = training_flops(counts, stage.learns)
        every = recompute_every(stage.checkpointing) if twice else 0
        if every:
            again = blocks + (self.image.vision_flops * shown if stage.learns.vision else 0)
            total += again / every
        return total
