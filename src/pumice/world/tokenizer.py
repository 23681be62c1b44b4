"""The pocket tokenizer: Llama-like BPE with byte fallback, so any UTF-8 text passes through it.

Words of the world and common words of captions are single tokens, and so are coordinates such as
' 0.25'; everything else falls apart into letters or, at last, bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pumice.world import language
from pumice.world.scenes import random_scene

VOCABULARY = 1600
# Common words of English captions (own list), so that those of photographs are not spelled out.
COMMON = (
    "a the of on in with and to is at an are two man woman people person sitting standing "
    "next holding riding street table front top sign large group field white black red blue "
    "green down near dog cat walking parked water plate sitting train by from over baseball "
    "tennis playing ball bus bathroom kitchen snow pizza small clock building beach food "
    "young horse room looking boy girl bear there one three playing up some other tree grass "
    "his her her their skateboard wooden hanging road truck car bike motorcycle wearing "
    "laptop computer bed bench giraffe elephant zebra surfboard board flying air kite "
    "umbrella covered while behind into area side old brown sheep cow orange yellow glass "
    "sink toilet window light city stop traffic fire hydrant cake fruit vase flowers chair "
    "couch phone book child children that this it has for who where what how which not can "
    "you me my your i be was will do does"
)


def corpus(scenes: int = 4000, seed: int = 0) -> Iterator[str]:
    """Lines of everything the world says, and the common words."""
    rng = random.Random(f"corpus {seed}")
    for number in range(100):
        yield from (f"[0.{number:02d}, 0.{number:02d}]" for _ in range(20))
    yield from ("[1.00, 1.00]" for _ in range(20))
    for _ in range(40):
        yield COMMON
    for turn in language.TEXT_DIALOGUES * 20:
        yield " ".join(turn)
    for index in range(scenes):
        scene = random_scene(index)
        yield language.caption(scene, rng)
        yield language.description(scene, rng)
        yield " ".join(language.reasoning(scene, rng))
        for question in language.questions(scene, 4, rng):
            # The first question of a conversation follows a line break, the others a space.
            yield f"USER: {question.text} ASSISTANT: {question.long}"
            yield f"\n{question.text}"
        yield from FORMATS


FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Please provide a short description for this region:",
    "Please provide the bounding box coordinate of the region this sentence describes:",
    "\nA. \nB. \nC. \nD. \nE. \nF. A B C D E F",
    "\nPlease provide\nDescribe the image in detail.\nDescribe the image briefly.\n"
    "What do you see in the image?",
    "\nAnswer\nGive\nHere\nName\nTell",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
)


def train_tokenizer(out: Path, lines: Iterator[str] | None = None, size: int = VOCABULARY) -> None:
    """Train the tokenizer and write it to `out` as Hugging Face tokenizer files."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    mark = "\u2581"
    splitting = pre_tokenizers.Split(
        Regex(rf"{mark}?[A-Za-z]+|{mark}?[01]\.\d\d|{mark}?[^\sA-Za-z{mark}]|{mark}|\s"), "isolated"
    )
    draft = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # A leading mark for the start of a text, as Llama's tokenizer puts it.
    draft.normalizer = normalizers.Sequence(
        [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    )
    draft.pre_tokenizer = splitting
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(bytes_), special_tokens=specials, show_progress=False,
        initial_alphabet=[*letters, mark], limit_alphabet=len(letters) + 1,
    )  # fmt: skip
    draft.train_from_iterator(lines or corpus(), trainer)
    tokenizer = _with_bytes(draft, specials, bytes_)
    tokenizer.normalizer = draft.normalizer
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(mark, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>", clean_up_tokenization_spaces=False, model_max_length=1024,
    )  # fmt: skip
    fast.save_pretrained(out)


def _with_bytes(draft: Any, specials: list[str], bytes_: list[str]) -> Any:
    """The trained pieces with the 256 byte tokens put in after the special ones, as in Llama."""
    import json

    from tokenizers import AddedToken, Tokenizer, models

    trained = json.loads(draft.to_str())["model"]
    pieces = [piece for piece in trained["vocab"] if piece not in specials]
    vocab = {piece: index for index, piece in enumerate([*specials, *bytes_, *pieces])}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    return tokenizer
