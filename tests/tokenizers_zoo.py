"""Small tokenizers, one of each kind with its own way with spaces, starts and special tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

MARK = "\u2581"
CHAT = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = ("USER", "ASSISTANT", "A1", "Q2", "INST", "cat", "the", "Yes", "image")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "A chat between a curious user and an assistant. USER: Hi ASSISTANT: Yes, the cat.\n\nUSER: Q",
    "the cat sat\n\non the mat :\n: The answers: yes. No?  Two  words. assistant\n\n[INST] [/INST]",
] * 4


def _llama_model() -> models.BPE:
    """A vocabulary written by hand, so that golden pieces can be told without running it."""
    letters = [chr(code) for code in range(33, 127)]
    pieces, merges = ["<unk>", "<s>", "</s>", *BYTES, MARK, *letters], []
    for word in [MARK + word for word in WORDS] + ["Hi", "</", MARK * 2]:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False) for text in [*dict.fromkeys(special.values()), *CHAT]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def _spaced_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.Replace(MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def llama() -> PreTrainedTokenizerFast:
    """A mark before every text, also after a special token (Llama 2 in tokenizer.json form)."""
    tokenizer = Tokenizer(_llama_model())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    )
    tokenizer.decoder = _spaced_decoder()
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def llama_first() -> PreTrainedTokenizerFast:
    """A mark at the very start only (Llama 2 with legacy = false)."""
    tokenizer = Tokenizer(_llama_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False)
    tokenizer.decoder = _spaced_decoder()
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """A Unigram model, whose vocabulary lets plain text reach '</s>' unless it is prevented."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((name, -20.0) for name in BYTES)]
    pieces += [(MARK, -5.0), *((letter, -6.0) for letter in letters)]
    pieces += [(MARK + word, -8.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="always")
    tokenizer.decoder = _spaced_decoder()
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _byte_level(split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def gpt2() -> PreTrainedTokenizerFast:
    """Byte-level; start, end and padding are one token."""
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    end = "<|endoftext|>"
    return _fast(tokenizer, bos_token=end, eos_token=end, pad_token=end)


def gpt2_prefix() -> PreTrainedTokenizerFast:
    """Byte-level with a space put before a text that has none."""
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def qwen() -> PreTrainedTokenizerFast:
    """Byte-level with NFC and line breaks that melt together; no BOS; non-special added tokens."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level(split)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", *CHAT])
    tokenizer.add_tokens(["<tool_call>"])
    return _fast(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": llama,
    "llama_first": llama_first,
    "unigram": unigram,
    "gpt2": gpt2,
    "gpt2_prefix": gpt2_prefix,
    "qwen": qwen,
}


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one kind, built once."""
    return KINDS[kind]()
