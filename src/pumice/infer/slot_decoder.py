"""A decoder of the Llama kind for GPUs, and for bfloat16: few kernels, started as one.

Used for the families of `best_decoder` in any precision, their linear layers plain or int8, on a
GPU always, on the CPU in half precision or when it is to be compiled. A decode step runs once as it
is and is recorded when it comes again; what is recorded must say what the step said.
Shapes: N tokens of all prompts, B rows, R slots, S columns, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pumice.infer.attending import Whole
from pumice.infer.cache import StackedCache
from pumice.infer.cuda_graphs import CudaGraphs
from pumice.infer.decoder import Chunk
from pumice.infer.slot_blocks import Shape, linear, rms_norm, slot_block, together
from pumice.infer.slots import (
    COLUMNS,
    Replay,
    SlotCache,
    SlotMemory,
    rounded_columns,
    rounded_slots,
)
from pumice.models.cross_attention import Media
from pumice.models.lmm import LMM

log = logging.getLogger(__name__)

# Recordings of one memory; each holds a few MB of the driver's.
_MOST_RECORDED = 64
# How far the logits of a recording may be from the step's, relative to the largest.
_TOLERANCE = 1e-2


class Graphs(Protocol):
    """What records steps."""

    def record(self, step: Callable[[], torch.Tensor]) -> Replay:
        """A step that has run once -> the same over what its inputs hold when it is run.

        Raises RuntimeError for what cannot be recorded.
        """


class SlotDecoder:
    """A language model of one of the families; `best_decoder` says whether it can be used."""

    def __init__(self, lmm: LMM, *, compiled: bool = False, graphs: Graphs | None = None) -> None:
        """`graphs` record its steps; those of CUDA on a GPU if left out, and none elsewhere."""
        model: Any = lmm.language.model
        config = lmm.language.config
        attention = model.model.layers[0].self_attn
        self._table = lmm.language.token_embeddings.detach()
        self._rotary: Any = model.model.rotary_emb
        self._blocks = [slot_block(layer) for layer in model.model.layers]
        self._norm = model.model.norm.weight.detach()
        self._head = together([model.lm_head])
        self._shape = Shape(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            attention.scaling,
            config.rms_norm_eps,
            model.model.layers[0].mlp.act_fn.forward,
        )
        self._step_block, self._last = self._shape.step, self._say
        if compiled:
            compile_ = partial(torch.compile, options=_options(self._table.device.type))
            self._step_block, self._last = compile_(self._shape.step), compile_(self._say)
        on_gpu = self._table.device.type == "cuda"
        self._graphs = CudaGraphs(lmm.device) if graphs is None and on_gpu else graphs
        self._like = self._table.new_empty(self._shape.key_heads, 0, self._shape.width)
        self._turns = torch.empty(2, 0, 1, 0)
        self._memory = SlotMemory(len(self._blocks), self._like)
        self._user: Callable[[], SlotCache | None] = lambda: None

    def at_work(self) -> AbstractContextManager[object]:
        """Nothing: torch's threads are set already."""
        return nullcontext()

    def cache(self) -> SlotCache:
        """An empty cache of rows in flight, over the memory of an earlier one that is gone."""
        if self._user() is not None:
            return SlotCache(SlotMemory(len(self._blocks), self._like))
        cache = SlotCache(self._memory)
        self._user = weakref.ref(cache)
        return cache

    def caches(self, columns: Sequence[int]) -> list[StackedCache]:
        """Empty caches of one row each."""
        return [StackedCache(len(self._blocks), self._like, count) for count in columns]

    def read(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Chunks of different prompts -> float[V] of each that ends."""
        device = self._table.device
        lengths = [len(chunk.embeds) for chunk in chunks]
        spans = [(c.first, c.first + count) for c, count in zip(chunks, lengths, strict=True)]
        places = torch.cat([torch.arange(*span) for span in spans]).to(device)
        turns = self._turns_for(max(last for _, last in spans))[:, places]
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        wanted = ends[[place for place, chunk in enumerate(chunks) if chunk.ends]]
        hidden = torch.cat([chunk.embeds for chunk in chunks])
        with _any_length(device):
            hidden = self._read(chunks, hidden, turns, wanted)
        return list(self._say(hidden)) if len(wanted) else []

    def _read(
        self,
        chunks: Sequence[Chunk],
        hidden: torch.Tensor,
        turns: torch.Tensor,
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """float[N, D], float[2, N, 1, Dh], long[K] -> float[K, D]: those of all chunks, and these.

        Behind the last block; keys and values are kept.
        """
        attend = Whole(chunks, self._shape.heads)
        for layer, block in enumerate(self._blocks):
            states = torch.cat(self._shape.states(block, hidden, turns), 1)
            # Of the last block's positions none but those whose logits are wanted go on.
            last = layer == len(self._blocks) - 1
            mixed = attend(layer, states, self._shape.scaling, last)
            if last:
                hidden = hidden[wanted]
            if len(mixed):
                hidden = self._shape.after(block, hidden, mixed)
        return hidden

    def step(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        cache: SlotCache,
        media: Media | None,
    ) -> torch.Tensor:
        """B tokens, and how many positions each row has before them -> float[B, V]."""
        rows = len(tokens)
        slots, columns = rounded_slots(rows), rounded_columns(max(lengths) + 1)
        memory = cache.memory
        memory.hold(slots, columns)
        # Slots of nobody get a token as well; what it leaves is written over by who joins.
        spare = [0] * (slots - rows)
        given = torch.tensor([[*tokens, *spare], [*lengths, *spare]])
        memory.inputs[:, :slots].copy_(given)
        logits = self._run(memory, slots, columns)
        cache.lengths = [length + 1 for length in lengths]
        return logits[:rows]

    @torch.inference_mode()
    def try_shapes(self) -> None:
        """Runs steps of other shapes than the first, for which a compiler compiles once more.

        What it then has is for any number of columns, and of rows from two on.
        """
        memory = SlotMemory(len(self._blocks), self._like)
        memory.hold(4, 2 * COLUMNS)
        for slots in (1, 4):
            self._run(memory, slots, 2 * COLUMNS)

    def _run(self, memory: SlotMemory, slots: int, columns: int) -> torch.Tensor:
        """The step over what `memory` holds as its inputs -> float[R, V]."""
        key = slots, columns
        if key in memory.recorded:
            # The latest used stands last.
            memory.recorded[key] = memory.recorded.pop(key)
            return memory.recorded[key]()
        turns = self._turns_for(columns)
        step = partial(self._forward, memory.inputs[:, :slots], memory.data, turns, slots, columns)
        with _any_length(self._table.device):
            logits = step()
            if self._graphs is not None and key in memory.seen:
                self._record(self._graphs, step, logits, memory.recorded, key)
        memory.seen.add(key)
        return logits

    def _record(
        self,
        graphs: Graphs,
        step: Callable[[], torch.Tensor],
        logits: torch.Tensor,
        recorded: dict[tuple[int, int], Replay],
        key: tuple[int, int],
    ) -> None:
        """Records a step that gave these logits, if it then gives them again."""
        try:
            replay = graphs.record(step)
            found = replay()
        except RuntimeError as error:
            self._graphs = None
            log.warning("decode steps are run kernel by kernel: recording one failed (%s).", error)
            return
        apart = (found - logits).abs().amax() / logits.abs().amax().clamp(min=1e-30)
        # Numbers that are none are compared with nothing.
        if float(apart) > _TOLERANCE:
            self._graphs = None
            log.warning(
                "decode steps are run kernel by kernel: a recorded one is %.2g from what it "
                "recorded.",
                float(apart),
            )
            return
        while len(recorded) >= _MOST_RECORDED:
            del recorded[next(iter(recorded))]
        recorded[key] = replay

    def _forward(
        self,
        inputs: torch.Tensor,
        data: tuple[torch.Tensor, torch.Tensor],
        every_turn: torch.Tensor,
        slots: int,
        columns: int,
    ) -> torch.Tensor:
        """long[2, R], float[L, >= R, Hk, >= S, Dh] twice -> float[R, V].

        What changes from step to step is read from these tensors alone.
        """
        ids, places = inputs
        keys, values = (part[:, :slots, :, :columns] for part in data)
        turns = every_turn[:, places]
        unseen = torch.arange(columns, device=places.device) > places.unsqueeze(1)
        mask = keys.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))[:, None, None]
        at = self._shape.written_at(places)
        hidden = F.embedding(ids, self._table)
        for layer, block in enumerate(self._blocks):
            known = keys[layer], values[layer]
            hidden = self._step_block(block, hidden, turns, at, *known, mask)
        return self._last(hidden)

    def _say(self, hidden: torch.Tensor) -> torch.Tensor:
        """float[N, D] -> float[N, V]."""
        return linear(rms_norm(hidden, self._norm, self._shape.epsilon), self._head)

    def _turns_for(self, needed: int) -> torch.Tensor:
        """float[2, >= needed, 1, Dh]: the turns of all positions below `needed`."""
        if needed > self._turns.shape[1]:
            count = max(needed, 2 * self._turns.shape[1], 256)
            every = torch.arange(count, device=self._table.device)
            # In float32, whatever the model's own precision.
            cos, sin = self._rotary(self._table[:1].float(), every.unsqueeze(0))
            half = sin.shape[-1] // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
            self._turns = torch.stack([cos[0], sin[0]]).unsqueeze(2)
        return self._turns


def _any_length(device: torch.device) -> AbstractContextManager[object]:
    # On a Hopper torch prefers cuDNN, which plans anew for each length of a text: some 30 ms.
    if device.type != "cuda":
        return nullcontext()
    kinds = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    return sdpa_kernel([*kinds])


def _options(device: str) -> dict[str, Any]:
    # With it, products of one row become reductions, which read weights faster than cuBLAS does.
    return {"coordinate_descent_tuning": True} if device == "cuda" else {}
