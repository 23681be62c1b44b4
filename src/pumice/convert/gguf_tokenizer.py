"""A Hugging Face tokenizer as llama.cpp's vocabulary, and a check that both read text alike.

llama.cpp has two ways of reading text that matter here. "llama" is sentencepiece's: neighbouring
pieces melt together as long as the result is in the vocabulary, the best score first. "gpt2" is
byte-level BPE by a list of merges, after a split that llama.cpp knows by name only.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pumice.core.errors import PumiceError

SPACE = "\u2581"

# gguf.TokenType, written out so that the module is readable without the package.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# The split before byte-level BPE, told apart by its pattern: the names are llama.cpp's.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}

# Read by both sides at export: marks, spaces, line breaks, several scripts.
PROBES = (
    "USER: What is in the picture? ASSISTANT: A dog, two cats and 17 red circles.",
    "two  spaces\n\nand\ttabs   ",
    "[0.25, 0.31, 0.80, 0.99] (3.14) {x} <p>naïve café</p>",
    "猫和狗 고양이 кошка 😀👩‍🚀 ﬁ",
    "Answer the question using a single word or phrase.\nyes",
    "aaaaaaa ........ ------ ))))",
)
_TRIED_PIECES = 4000


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp is told of a tokenizer: one entry of `tokens` for each row of the embedding.

    `scores` belong to the model "llama", `merges` to "gpt2". `space_prefix` puts a space before a
    text, which llama.cpp does after every special token; `first_only` says that the tokenizer does
    it at the very start alone.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_prefix: bool
    first_only: bool = False


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer for an embedding of `size` rows.

    Raises for tokenizers llama.cpp has no equal of, and when it would read `PROBES` otherwise.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}")
    _check_normalizer(data.get("normalizer"), byte_level=not model.get("byte_fallback"))
    tokens, types = _entries(tokenizer, model, size)
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    if not model.get("byte_fallback"):
        pre = _split_name(data.get("pre_tokenizer"))
        return Vocabulary("gpt2", pre, tokens, types, [], [" ".join(m) for m in merges], False)
    scores = _scores(tokens, merges)
    prefix = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0] != "a"
    first = (data.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"
    vocabulary = Vocabulary("llama", "default", tokens, types, scores, [], prefix, first)
    if wrong := _differences(vocabulary, tokenizer, PROBES):
        raise _refused(f"llama.cpp would read {wrong[0]}")
    return vocabulary


def spm_ids(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids llama.cpp's "llama" tokenizer gives `text` (llama-vocab.cpp, llm_tokenizer_spm)."""
    known = {token: index for index, token in enumerate(vocabulary.tokens)}
    return _spm_ids(vocabulary, known, text)


def _spm_ids(vocabulary: Vocabulary, known: dict[str, int], text: str) -> list[int]:
    if not text:
        return []
    pieces = list((" " * vocabulary.space_prefix + text).replace(" ", SPACE))
    after = [*range(1, len(pieces)), -1]
    before = list(range(-1, len(pieces) - 1))
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            index = known.get(pieces[left] + pieces[right])
            if index is not None:
                size = len(pieces[left]) + len(pieces[right])
                heapq.heappush(queue, (-vocabulary.scores[index], left, right, size))

    for place in range(len(pieces) - 1):
        offer(place, place + 1)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        if not pieces[left] or not pieces[right] or len(pieces[left] + pieces[right]) != size:
            continue  # One of the two has melted into another piece meanwhile.
        pieces[left], pieces[right] = pieces[left] + pieces[right], ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [index for piece in pieces if piece for index in _ids_of(piece, known)]


def _ids_of(piece: str, known: dict[str, int]) -> list[int]:
    if piece in known:
        return [known[piece]]
    return [known[f"<0x{byte:02X}>"] for byte in piece.encode()]


def _entries(tokenizer: Any, model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        # Beyond the embedding the model has no row for a token, so it can be neither read nor said.
        if index >= size:
            continue
        tokens[index] = token
        types[index] = NORMAL
        if model.get("byte_fallback") and _is_byte(token):
            types[index] = BYTE
        if index in added:
            types[index] = CONTROL if added[index].special else USER_DEFINED
    unknown = tokenizer.unk_token_id
    if unknown is not None and model.get("byte_fallback") and unknown < size:
        types[unknown] = UNKNOWN
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    # Only the order matters: a piece is as good as the first merge that makes it.
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    worst = -float(len(merges) + 1)
    return [-float(rank[token]) if token in rank else worst for token in tokens]


def reading_differences(vocabulary: Vocabulary, tokenizer: Any) -> tuple[int, int, str]:
    """How many of the vocabulary's own pieces, strung together, are read otherwise by llama.cpp.

    Gives differing texts, texts tried, and the first difference in words. A tokenizer trained as
    BPE knows only its own merges, while llama.cpp joins whatever makes a known piece.
    """
    if vocabulary.model != "llama":
        return 0, 0, ""
    pieces = [
        token.replace(SPACE, " ")
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind == NORMAL and len(token) > 1
    ]
    pieces = pieces[:: max(1, len(pieces) // _TRIED_PIECES)]
    texts = [" ".join(pieces[i : i + 10]) for i in range(0, len(pieces), 10)]
    found = _differences(vocabulary, tokenizer, texts)
    return len(found), len(texts), found[0] if found else ""


def _differences(vocabulary: Vocabulary, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    known = {token: index for index, token in enumerate(vocabulary.tokens)}
    found = []
    for text in texts:
        ours = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        theirs = _spm_ids(vocabulary, known, text)
        if ours != theirs:
            same = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0
            )
            part = slice(max(0, same - 1), same + 4)
            found.append(f"{tokenizer.decode(ours[part])!r} as {theirs[part]}, not {ours[part]}")
    return found


def _check_normalizer(normalizer: dict[str, Any] | None, *, byte_level: bool) -> None:
    parts = (normalizer or {}).get("normalizers") or ([normalizer] if normalizer else [])
    allowed = {"NFC"} if byte_level else {"Prepend", "Replace"}
    wrong = [part["type"] for part in parts if part["type"] not in allowed]
    if wrong:
        raise _refused(f"it rewrites text first ({', '.join(wrong)})")


def _split_name(split: dict[str, Any] | None) -> str:
    parts = (split or {}).get("pretokenizers") or ([split] if split else [])
    patterns = [part["pattern"]["Regex"] for part in parts if "Regex" in part.get("pattern", {})]
    level = [part for part in parts if part["type"] == "ByteLevel"]
    if len(level) == 1 and not level[0]["add_prefix_space"]:
        if not patterns and level[0]["use_regex"] and len(parts) == 1:
            return "gpt-2"
        if len(patterns) == 1 and patterns[0] in SPLITS and len(parts) == 2:
            return SPLITS[patterns[0]]
    kinds = " + ".join(part["type"] for part in parts) or "none"
    raise _refused(
        f"its split ({kinds} {' '.join(patterns)}) is none that llama.cpp has a name for"
    )


def _refused(reason: str) -> PumiceError:
    return PumiceError(
        f"this tokenizer cannot be written to GGUF: {reason}. Tokenizers of Llama 2 (BPE with byte "
        f"fallback), Llama 3, Qwen2 and GPT-2 are allowed; export with --to hf instead."
    )
