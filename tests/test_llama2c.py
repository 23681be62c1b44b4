"""llama2.c models as Hugging Face folders: the same numbers, ids and words as llama2.c itself.

The oracle is llama2.c's arithmetic and encoder written out in numpy below, rotary pairs side by
side, with nothing of the converter in it.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pumice
import tiny
from pumice.convert.llama2c import convert_llama2c, is_llama2c, read_llama2c
from pumice.convert.text_only import is_language_folder, open_language_folder
from pumice.core.errors import PumiceError
from pumice.core.types import Request, Sampling, user
from pumice.infer.model import Model
from pumice.models.language import LanguageModel
from pumice.models.lmm import LMM
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from real_files import DATA, needs

STORIES = DATA / "stories260k"
stories = needs(STORIES, "the Llama of 260,000 weights")

# What llama2.c itself continues "Once upon a time" with, greedily; `Reference` below agrees.
STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, "
    "let's go to the park.\" Lily was sad and didn't know what to do."
)


@dataclass
class Reference:
    """llama2.c: the file's arrays as they are, one position after the other."""

    arrays: dict[str, Any]
    heads: int
    kv_heads: int

    def logits(self, ids: list[int]) -> Any:
        a, heads = self.arrays, self.heads
        x = a["tok"][ids]
        dim = x.shape[1] // heads
        for n in range(len(a["wq"])):
            h = norm(x, a["norm1"][n])
            q = turned((h @ a["wq"][n].T).reshape(len(ids), heads, dim))
            k = turned((h @ a["wk"][n].T).reshape(len(ids), self.kv_heads, dim))
            v = (h @ a["wv"][n].T).reshape(len(ids), self.kv_heads, dim)
            k, v = (np.repeat(part, heads // self.kv_heads, axis=1) for part in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(dim)
            scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + np.einsum("hts,shd->thd", weights, v).reshape(x.shape) @ a["wo"][n].T
            h = norm(x, a["norm2"][n])
            gate = h @ a["w1"][n].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ a["w3"][n].T)) @ a["w2"][n].T
        return norm(x, a["norm"]) @ a["tok"].T

    def continued(self, ids: list[int], count: int) -> list[int]:
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids


def norm(x: Any, weight: Any) -> Any:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x: Any) -> Any:
    """Rotary embedding of neighbours (2i, 2i + 1)."""
    places, dim = np.arange(len(x))[:, None, None], x.shape[-1]
    angle = places / 10000.0 ** (np.arange(0, dim, 2) / dim)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * np.cos(angle) - x[..., 1::2] * np.sin(angle)
    out[..., 1::2] = x[..., 0::2] * np.sin(angle) + x[..., 1::2] * np.cos(angle)
    return out


def reference(path: Path) -> Reference:
    """Read from the version 0 file, straight by its documented order."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    flat, at = np.frombuffer(data, "<f4", offset=28).astype(np.float64), 0

    def take(*shape: int) -> Any:
        nonlocal at
        at += math.prod(shape)
        return flat[at - math.prod(shape) : at].reshape(shape)

    keys = dim // heads * kv_heads
    a = {"tok": take(abs(vocab), dim), "norm1": take(layers, dim), "wq": take(layers, dim, dim)}
    a |= {"wk": take(layers, keys, dim), "wv": take(layers, keys, dim)}
    a |= {"wo": take(layers, dim, dim), "norm2": take(layers, dim)}
    a |= {"w1": take(layers, hidden, dim), "w2": take(layers, dim, hidden)}
    a |= {"w3": take(layers, hidden, dim), "norm": take(dim)}
    return Reference(a, heads, kv_heads)


def encoder(path: Path) -> Callable[[str], list[int]]:
    """llama2.c's encode() without BOS: join the best-scored neighbours until none are known."""
    data, at = path.read_bytes(), 4
    pieces, scores = [], []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode())
        scores.append(score)
        at += 8 + length
    known = {piece: index for index, piece in reversed(list(enumerate(pieces)))}

    def encode(text: str) -> list[int]:
        ids = []
        for char in " " + text if text else "":
            ids += [known[char]] if char in known else [byte + 3 for byte in char.encode()]
        while True:
            joins = [
                (-scores[known[both]], place)
                for place in range(len(ids) - 1)
                if (both := pieces[ids[place]] + pieces[ids[place + 1]]) in known
            ]
            if not joins:
                return ids
            place = min(joins)[1]
            ids[place : place + 2] = [known[pieces[ids[place]] + pieces[ids[place + 1]]]]

    return encode


WORDS = "the at he that cat  in".split(" ")


def small(folder: Path, *, version: int = 0, kv_heads: int = 2, hidden: int = 24) -> Path:
    """A random model of llama2.c with a tokenizer of bytes, letters and a few joined pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [" ", *"abcdefghijklmnopqrstuvwxyzT.,"]
    joined = ["th", " t", "he", "the", " the", "at", "in", "aa", "aaa", " a", "cat", "  "]
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += joined + letters
    with (folder / "tokenizer.bin").open("wb") as file:
        file.write(struct.pack("<i", 6))
        for index, piece in enumerate(pieces):
            score = -float(index - 259) if index >= 259 else 0.0
            file.write(struct.pack("<fi", score, len(piece.encode())) + piece.encode())
    dim, layers, heads, context = 16, 2, 4, 64
    keys = dim // heads * kv_heads
    rng = np.random.default_rng(0)

    def random_(*shape: int) -> Any:
        return rng.normal(0, 0.3, shape).astype("<f4")

    a = {"tok": random_(len(pieces), dim), "norm1": random_(layers, dim)}
    a["tok"][:259] *= 0.1  # so that it says letters rather than single bytes
    a |= {"wq": random_(layers, dim, dim), "wk": random_(layers, keys, dim)}
    a |= {"wv": random_(layers, keys, dim), "wo": random_(layers, dim, dim)}
    a |= {"norm2": random_(layers, dim), "w1": random_(layers, hidden, dim)}
    a |= {"w2": random_(layers, dim, hidden), "w3": random_(layers, hidden, dim)}
    a |= {"norm": random_(dim)}
    sizes = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, len(pieces), context)
    if version == 0:
        tables = np.zeros(context * dim // heads, "<f4")
        content = sizes + b"".join(a[name].tobytes() for name in a) + tables.tobytes()
    else:
        order = ["norm1", "norm2", "norm", "tok", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
        head = struct.pack("<Ii", 0x616B3432, version) + sizes + b"\1"
        content = head.ljust(256, b"\0") + b"".join(a[name].tobytes() for name in order)
    (folder / f"weights{version}.bin").write_bytes(content)
    return folder


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_those_of_llama2c(tmp_path: Path, kv_heads: int) -> None:
    src = small(tmp_path / "src", kv_heads=kv_heads)
    model = AutoModelForCausalLM.from_pretrained(convert_llama2c(src, tmp_path / "hf"))
    ids = list(range(250, 262)) + [1, 3]
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].double().numpy()
    assert np.abs(ours - reference(src / "weights0.bin").logits(ids)).max() < 1e-4


def test_both_versions_hold_the_same_model(tmp_path: Path) -> None:
    old = read_llama2c(small(tmp_path / "a") / "weights0.bin")
    new = read_llama2c(small(tmp_path / "a", version=1) / "weights1.bin")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    convert_llama2c(tmp_path / "a", tmp_path / "hf")  # and a folder with both is no riddle


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    kinds: list[Callable[[], str]] = [
        lambda: "".join(rng.choice("at hecin") for _ in range(rng.randrange(40))),
        lambda: "".join(rng.choice("aeT.,\n'é猫😀07<") for _ in range(rng.randrange(30))),
        lambda: "".join(rng.choice("al ") * rng.randrange(1, 5) for _ in range(9)),
    ]
    return [rng.choice(kinds)() for _ in range(count)]


def test_ids_are_those_of_llama2c(tmp_path: Path) -> None:
    src = small(tmp_path / "src")
    encode = encoder(src / "tokenizer.bin")
    tokenizer = AutoTokenizer.from_pretrained(convert_llama2c(src, tmp_path / "hf"))
    for text in ["", " ", "the cat that", *random_texts(400)]:
        assert tokenizer(text)["input_ids"] == [1, *encode(text)], repr(text)
        assert tokenizer.decode(encode(text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("change", ["cut", "grown", "int8", "other"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, change: str) -> None:
    src = small(tmp_path / "src", version=1)
    path = src / "weights1.bin"
    data = path.read_bytes()
    changed = {
        "cut": data[:-4],
        "grown": data + b"\0",
        "int8": data[:4] + struct.pack("<i", 2) + data[8:],
        "other": b"PK\3\4" + data[4:],
    }
    path.write_bytes(changed[change])
    with pytest.raises(PumiceError, match="int8" if change == "int8" else "no llama2.c checkpoint"):
        convert_llama2c(src, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_two_models_in_one_folder_must_be_told_apart(tmp_path: Path) -> None:
    src = small(tmp_path / "src")
    shutil.copy(src / "weights0.bin", src / "copy.bin")
    with pytest.raises(PumiceError, match="several"):
        convert_llama2c(src, tmp_path / "hf")
    convert_llama2c(src / "copy.bin", tmp_path / "hf")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    src = small(tmp_path / "src")
    extra = struct.pack("<fi", -99.0, 2) + b"zz"
    with (src / "tokenizer.bin").open("ab") as file:
        file.write(extra)
    with pytest.raises(PumiceError, match="belong to different models"):
        convert_llama2c(src, tmp_path / "hf")
    (src / "tokenizer.bin").write_bytes((src / "tokenizer.bin").read_bytes()[:-3])
    with pytest.raises(PumiceError, match="no whole tokenizer"):
        convert_llama2c(src, tmp_path / "hf")


def test_it_is_known_by_its_content(tmp_path: Path) -> None:
    src = small(tmp_path / "llava-v1.5-13b")
    assert is_llama2c(src) and is_llama2c(src / "weights0.bin")
    assert not is_llama2c(tmp_path)
    (src / "tokenizer.bin").unlink()
    assert not is_llama2c(src)


def test_a_language_model_alone_answers_text_and_refuses_images(tmp_path: Path) -> None:
    folder = convert_llama2c(small(tmp_path / "src"), tmp_path / "hf")
    assert is_language_folder(folder) and not is_language_folder(tmp_path)
    model = Model(*open_language_folder(folder))
    sampling = Sampling(max_new_tokens=4)
    asked = [Request((user("the cat"),), sampling, "a"), Request((user("x", b"?"),), sampling, "b")]
    good, bad = model.generate(asked)
    assert good.error is None and good.image_tokens == 0 and good.prompt_tokens == 4
    assert bad.error is not None and "sees no images" in bad.error
    # The next request is not harmed, and the answer is the decoder's own.
    ids = torch.tensor([model.processor.encode_prompt([user("the cat")]).input_ids])
    assert ids.tolist() == [AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]]
    greedy = AutoModelForCausalLM.from_pretrained(folder).generate(
        ids, max_new_tokens=4, do_sample=False
    )
    assert model.processor.decode(greedy[0, ids.shape[1] :].tolist()) == good.text


def test_it_serves_as_the_language_model_of_a_recipe(tmp_path: Path) -> None:
    folder = convert_llama2c(small(tmp_path / "src"), tmp_path / "hf")
    vision = tiny.vision_folder(tmp_path / "vision")
    lmm = LMM.from_backbones(vision, folder, "mlp2x_gelu", -2, "patch")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = ImageSpec("pad", tiny.IMAGE_SIZE)
    model = Model(lmm, Processor(tokenizer, spec, "vicuna_v1", "", lmm.image_tokens))
    picture = PIL.Image.new("RGB", (40, 24), "red")
    answer = model.ask("the cat", images=[picture], max_new_tokens=2)
    assert answer.image_tokens == tiny.NUM_PATCHES and answer.new_tokens == 2


def test_the_command_line_continues_text(tmp_path: Path, run: Any) -> None:
    """Under a name that says something else: only config.json tells what a folder is."""
    folder = convert_llama2c(small(tmp_path / "src"), tmp_path / "llava-v1.5-7b")
    rows = [{"id": str(n), "messages": [{"role": "user", "content": "the cat"}]} for n in range(2)]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    args = ["--requests", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl"]
    code, _, err = run("generate", folder, *args, "--max-new-tokens", "5", "--dtype", "float32")
    assert code == 0, err
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    text = pumice.load(folder, dtype="float32").ask("the cat", max_new_tokens=5).text
    assert text and [answer["text"] for answer in answers] == [text, text]


@stories
def test_the_real_model_tells_its_story(tmp_path: Path) -> None:
    folder = convert_llama2c(STORIES, tmp_path / "hf")
    encode = encoder(STORIES / "tokenizer.bin")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(encode(STORY)) == STORY
    prompt = [1, *encode("Once upon a time")]
    oracle = reference(STORIES / "checkpoint_legacy.bin")
    written = oracle.continued(prompt, 110)
    model = Model(*open_language_folder(folder))
    answer = model.ask("Once upon a time", max_new_tokens=110)
    assert model.processor.encode_prompt([user("Once upon a time")]).input_ids == prompt
    assert answer.text == tokenizer.decode(written[len(prompt) :])
    assert answer.text.startswith(STORY)
    ours = model.logits("Once upon a time").double().numpy()
    assert np.abs(ours - oracle.logits(prompt)).max() < 1e-4
    for text in [STORY, *random_texts(300)]:
        assert tokenizer(text)["input_ids"] == [1, *encode(text)], repr(text)


@stories
def test_the_real_model_ends_its_story(tmp_path: Path) -> None:
    """Texts are kept apart by <s> in training: it ends the answer, and is not seen in it."""
    model = Model(*open_language_folder(convert_llama2c(STORIES, tmp_path / "hf")))
    answer = model.ask("Once upon a time", max_new_tokens=480)
    assert answer.finish_reason == "stop" and answer.text.endswith('a good friend."')
    assert LanguageModel.from_folder(tmp_path / "hf").hidden_size == 64
