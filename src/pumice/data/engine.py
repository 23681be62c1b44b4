"""The data engine: captions and boxes -> an LLM -> training conversations that can be trusted.

Replies live in the client's cache. Everything else is made from them in the order of the images,
so a run that was killed and one that was not end with the same files.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pumice.core.errors import PumiceError
from pumice.core.files import HALVES, sha256_bytes
from pumice.core.llm_client import LLMClient
from pumice.core.llm_types import ChatRequest, Reply
from pumice.core.progress import progress
from pumice.data.engine_examples import Example
from pumice.data.engine_filters import NEAR, check_language
from pumice.data.engine_judge import Judge
from pumice.data.engine_prompts import VERSION, Kind, Pair, asked_text
from pumice.data.engine_scenes import Described

# So many images without a connection, and none with one, are no passing fault.
_UNREACHED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is generated: the kind, by which model, and how its replies are judged.

    `examples` stand before each request as replies that were given. `near` is the share of
    three-word runs from which on two texts are taken for one; 1 finds copies alone.
    """

    kind: Kind
    model: str
    max_tokens: int = 1024
    temperature: float = 0.7
    language: str = "en"
    near: float = NEAR
    examples: tuple[Example, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_language(self.language)

    def request(self, scene: Described) -> ChatRequest:
        """The call that is made for an image."""
        asked = asked_text(scene, boxes=self.kind.shows_boxes)
        shown = [message for one in self.examples for message in one.messages(self.kind)]
        return ChatRequest(
            model=self.model,
            messages=(
                {"role": "system", "content": self.kind.system()},
                *shown,
                {"role": "user", "content": asked},
            ),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            options=self.options,
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Before anything is sent: calls to make, and about what they and at most what they cost."""

    images: int
    cached: int
    expected: float | None
    most: float | None


@dataclass(slots=True)
class Outcome:
    """What became of the images: kept, rejected by reason, without a reply by failure."""

    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""
    cost: float = 0.0

    @property
    def replied(self) -> int:
        """Images with a reply, good or not."""
        return self.kept + self.rejected.total()

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"rejected": dict(self.rejected), "failed": dict(self.failed)}


def estimate(client: LLMClient, order: Order, scenes: Sequence[Described]) -> Estimate:
    """What a run would cost; replies at hand say how long the others will be."""
    open_requests = [
        request for scene in scenes if not client.is_cached(request := order.request(scene))
    ]
    cached = len(scenes) - len(open_requests)
    if client.prices is None:
        return Estimate(len(scenes), cached, None, None)
    known = client.cache.completion_tokens() if client.cache is not None else []
    usual = sum(known) / len(known) if known else order.kind.usual_tokens
    prices = client.prices
    return Estimate(
        len(scenes),
        cached,
        sum(prices.expected(request, usual) for request in open_requests),
        sum(prices.most(request) for request in open_requests),
    )


def generate(
    client: LLMClient, order: Order, scenes: Sequence[Described], out: Path, rejected: Path
) -> Outcome:
    """Asks for every image; good rows go to `out`, the others with their reason to `rejected`.

    Both files appear whole, at the end. An image without a reply is in neither and is counted. An
    endpoint that no call reaches, from the first on, ends the run.
    """
    outcome = Outcome()
    judge = Judge(order.kind, order.language, order.near, order.examples)
    parts = [path.with_name(f".{path.name}.part") for path in (out, rejected)]
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            closing(client.ask_all(order.request(scene) for scene in scenes)) as replies,
            parts[0].open("w", encoding="utf-8", errors=HALVES) as good,
            parts[1].open("w", encoding="utf-8", errors=HALVES) as bad,
            progress(len(scenes), f"generating {order.kind.name}") as bar,
        ):
            for scene, reply in zip(scenes, replies, strict=True):
                outcome.cost += reply.cost or 0.0
                _place(order, judge, scene, reply, outcome, good, bad)
                _refuse_unreachable(outcome)
                bar.update(1, kept=outcome.kept, rejected=outcome.rejected.total())
            for file in (good, bad):
                file.flush()
                os.fsync(file.fileno())
        for part, path in zip(parts, (out, rejected), strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return outcome


def _refuse_unreachable(outcome: Outcome) -> None:
    """A wrong address would take as long for its failures as the right one for its replies."""
    lost = outcome.failed["connection"]
    if lost == _UNREACHED and lost == outcome.failed.total() and not outcome.replied:
        raise PumiceError(
            f"the first {lost} images got no reply: {outcome.first_failure}. Check --endpoint and "
            f"whether it runs; the same command goes on where it stopped."
        )


def _place(
    order: Order,
    judge: Judge,
    scene: Described,
    reply: Reply,
    outcome: Outcome,
    good: TextIO,
    bad: TextIO,
) -> None:
    """Writes the row of one image where it belongs, and counts it."""
    if reply.failure is not None and reply.failure.kind not in ("empty", "filtered"):
        outcome.failed[reply.failure.kind] += 1
        outcome.first_failure = outcome.first_failure or reply.failure.reason
        return
    pairs, fault = judge(scene, reply)
    provenance = _provenance(order, scene, reply)
    if fault is None:
        outcome.kept += 1
        row = {
            "id": f"{scene.id}-{order.kind.name}",
            "image": scene.image,
            "conversations": list(_turns(pairs)),
            "provenance": provenance,
        }
        good.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    outcome.rejected[fault.partition(":")[0]] += 1
    row = {"id": scene.id, "image": scene.image, "reason": fault, "text": reply.text}
    bad.write(json.dumps(row | {"provenance": provenance}, ensure_ascii=False) + "\n")


def _turns(pairs: Sequence[Pair]) -> Iterator[dict[str, str]]:
    for number, (asks, says) in enumerate(pairs):
        yield {"from": "human", "value": asks if number else f"<image>\n{asks}"}
        yield {"from": "gpt", "value": says}


def _provenance(order: Order, scene: Described, reply: Reply) -> dict[str, Any]:
    prompt = json.dumps(order.request(scene).body(), sort_keys=True, ensure_ascii=False)
    return {
        "kind": order.kind.name,
        "model": reply.model or order.model,
        "prompt_version": VERSION,
        "prompt_hash": sha256_bytes(prompt.encode())[:16],
        "sources": list(scene.sources),
        "cost": reply.cost,
    }
