"""GGUF files: what llama.cpp would compute from them is what our model computes.

The oracle is llama.cpp's own order of things written out in numpy below (rotary pairs side by side,
its tensor names, its metadata keys), reading the files through the `gguf` package alone.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM as Decoder
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import tiny
import tokenizers_zoo
from pumice.convert.gguf import GGUFExport, write_gguf
from pumice.convert.gguf_read import GGUFTensors
from pumice.convert.gguf_tokenizer import PROBES, read_vocabulary, spm_ids
from pumice.convert.llama2c import read_llama2c_tokenizer
from pumice.convert.rotary import to_halves, to_neighbours
from pumice.core.errors import PumiceError
from pumice.models.lmm import LMM
from pumice.models.pretrained import config_to_dict
from pumice.processing.images import ImageSpec
from pumice.processing.processor import Processor
from real_files import CHECKPOINTS, DATA, needs


def build(root: Path, *, vision: str = "clip_vision_model", language: Any = None) -> LMM:
    """A tiny model with every bias and norm away from its starting value."""
    tiny.vision_folder(root / "vision", vision)
    tiny.language_folder(root / "language", tied=False)
    if language is not None:
        torch.manual_seed(2)
        Decoder.from_config(language).save_pretrained(root / "language")
    lmm = LMM.from_backbones(root / "vision", root / "language", "mlp2x_gelu", -2, "patch")
    with torch.no_grad():
        for parameter in lmm.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return lmm.eval()


def processor(root: Path, lmm: LMM, **spec: Any) -> Processor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "language")
    image = ImageSpec(spec.pop("mode", "pad"), tiny.IMAGE_SIZE, **spec)
    return Processor(tokenizer, image, "vicuna_v1", "", lmm.image_tokens)


def export(root: Path, lmm: LMM, dtype: Any = "f32", **spec: Any) -> GGUFExport:
    return write_gguf(
        lmm.config, lmm.state_dict(), processor(root, lmm, **spec), root / "out", dtype
    )


def config(kind: type = LlamaConfig, vocab: int = 417, tied: bool = False, **extra: Any) -> Any:
    sizes = dict(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    return kind(**sizes, **heads, tie_word_embeddings=tied, **extra)


class Files:
    """A GGUF file as its own key-values and arrays, nothing of ours in between."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.meta = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {entry.name: entry.tensor_type.name for entry in reader.tensors}
        self.arrays = {}
        for entry in reader.tensors:
            shape = [int(size) for size in reversed(entry.shape)]
            values = gguf.quants.dequantize(entry.data, entry.tensor_type)
            self.arrays[entry.name] = values.reshape(shape).astype(np.float64)

    def linear(self, name: str, x: Any) -> Any:
        return x @ self.arrays[f"{name}.weight"].T + self.arrays.get(f"{name}.bias", 0.0)


def attend(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """float[T, h, d] each -> float[T, h * d]; fewer key heads are repeated."""
    k, v = (np.repeat(part, q.shape[1] // part.shape[1], axis=1) for part in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v).reshape(len(q), -1)


def turned(x: Any, base: float, factors: Any, neighbours: bool) -> Any:
    """ggml_rope: mode NORM turns (2i, 2i + 1), NEOX turns (i, i + d/2)."""
    dim = x.shape[-1]
    angle = np.arange(len(x))[:, None, None] / base ** (np.arange(0, dim, 2) / dim) / factors
    first = np.s_[..., 0::2] if neighbours else np.s_[..., : dim // 2]
    second = np.s_[..., 1::2] if neighbours else np.s_[..., dim // 2 :]
    out = np.empty_like(x)
    out[first] = x[first] * np.cos(angle) - x[second] * np.sin(angle)
    out[second] = x[first] * np.sin(angle) + x[second] * np.cos(angle)
    return out


def language_logits(file: Files, x: Any) -> Any:
    """float[T, D] embeddings -> float[T, V], as llama.cpp's graphs llama and qwen2."""
    meta, a = file.meta, file.arrays
    arch = meta["general.architecture"]
    heads, kv_heads = meta[f"{arch}.attention.head_count"], meta[f"{arch}.attention.head_count_kv"]
    eps, base = meta[f"{arch}.attention.layer_norm_rms_epsilon"], meta[f"{arch}.rope.freq_base"]
    factors = a.get("rope_freqs.weight", 1.0) * meta.get(f"{arch}.rope.scaling.factor", 1.0)

    def rms(x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * a[f"{name}.weight"]

    for n in range(meta[f"{arch}.block_count"]):
        h = rms(x, f"blk.{n}.attn_norm")
        q = file.linear(f"blk.{n}.attn_q", h).reshape(len(x), heads, -1)
        k = file.linear(f"blk.{n}.attn_k", h).reshape(len(x), kv_heads, -1)
        v = file.linear(f"blk.{n}.attn_v", h).reshape(len(x), kv_heads, -1)
        assert q.shape[-1] == meta[f"{arch}.rope.dimension_count"]
        q, k = (turned(part, base, factors, arch == "llama") for part in (q, k))
        x = x + file.linear(f"blk.{n}.attn_output", attend(q, k, v, causal=True))
        h = rms(x, f"blk.{n}.ffn_norm")
        gate = file.linear(f"blk.{n}.ffn_gate", h)
        up = file.linear(f"blk.{n}.ffn_up", h)
        x = x + file.linear(f"blk.{n}.ffn_down", gate / (1 + np.exp(-gate)) * up)
    head = "output.weight" if "output.weight" in a else "token_embd.weight"
    return rms(x, "output_norm") @ a[head].T


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def image_features(file: Files, pixels: Any) -> Any:
    """float[3, S, S] -> float[Q, D], as clip.cpp's graph llava."""
    meta, a = file.meta, file.arrays
    size, patch = meta["clip.vision.image_size"], meta["clip.vision.patch_size"]
    eps, side = meta["clip.vision.attention.layer_norm_epsilon"], size // patch

    def norm(x: Any, name: str) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * a[f"{name}.weight"] + a[f"{name}.bias"]

    squares = pixels.reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4)
    kernel = a["v.patch_embd.weight"].reshape(-1, 3 * patch * patch)
    x = squares.reshape(side * side, -1) @ kernel.T + a.get("v.patch_embd.bias", 0.0)
    if "v.class_embd" in a:
        x = np.concatenate([a["v.class_embd"][None], x])
    x = x + a["v.position_embd.weight"]
    x = norm(x, "v.pre_ln") if "v.pre_ln.weight" in a else x
    heads, hidden = meta["clip.vision.attention.head_count"], meta["clip.vision.embedding_length"]
    # llama.cpp swaps the two where the first dimension of "down" is the width of the model.
    swap = a["v.blk.0.ffn_down.weight"].shape[1] == hidden
    up, down = ("ffn_down", "ffn_up") if swap else ("ffn_up", "ffn_down")
    [last] = meta["clip.vision.feature_layer"]
    assert last <= meta["clip.vision.block_count"]
    for n in range(last):
        h = norm(x, f"v.blk.{n}.ln1")
        q, k, v = (
            file.linear(f"v.blk.{n}.attn_{part}", h).reshape(len(x), heads, -1) for part in "qkv"
        )
        x = x + file.linear(f"v.blk.{n}.attn_out", attend(q, k, v, causal=False))
        h = file.linear(f"v.blk.{n}.{up}", norm(x, f"v.blk.{n}.ln2"))
        h = gelu(h) if meta["clip.use_gelu"] else h / (1 + np.exp(-1.702 * h))
        x = x + file.linear(f"v.blk.{n}.{down}", h)
    x = x[1:] if "v.class_embd" in a else x
    return file.linear("mm.2", gelu(file.linear("mm.0", x)))


TEXT = [1, 40, 300, 7, 260, 99, 33, 301, 12]
LANGUAGES = {
    "llama": config(),
    "biases": config(attention_bias=True),
    "wide heads": config(head_dim=16),
    "linear": config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "llama3": config(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "mistral": config(MistralConfig, sliding_window=None),
    "qwen2": config(Qwen2Config),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_llama_cpp_would_say_the_same(tmp_path: Path, name: str) -> None:
    lmm = build(tmp_path, language=LANGUAGES[name])
    file = Files(export(tmp_path, lmm).language)
    ours = lmm(torch.tensor([TEXT]))[0].detach().double().numpy()
    theirs = language_logits(file, file.arrays["token_embd.weight"][TEXT])
    assert np.abs(ours - theirs).max() < 1e-4
    assert set(file.types.values()) == {"F32"}


@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
def test_llama_cpp_would_see_the_same(tmp_path: Path, vision: str) -> None:
    lmm = build(tmp_path, vision=vision)
    out = export(tmp_path, lmm)
    file = Files(out.mmproj)
    pixels = tiny.pixels(1)
    theirs = image_features(file, pixels[0].double().numpy())
    # llama.cpp's GELU is the tanh formula; with it in ours as well nothing else may differ.
    lmm.connector[1] = torch.nn.GELU(approximate="tanh")  # type: ignore[index]
    ours = lmm.connector(lmm.vision(pixels))[0].detach().double().numpy()
    assert np.abs(ours - theirs).max() < 1e-4
    assert file.meta["clip.vision.image_mean"] == pytest.approx(ImageSpec("pad", 32).mean)
    text = Files(out.language)
    rows = np.concatenate([text.arrays["token_embd.weight"][TEXT], theirs])
    with torch.no_grad():
        embeds = torch.cat([lmm.language.embed(torch.tensor([TEXT])), lmm.encode_images(pixels)], 1)
        whole = lmm.language(embeds)[0].double().numpy()
    assert np.abs(whole - language_logits(text, rows)).max() < 1e-4


def test_an_mlp_as_narrow_as_the_backbone_is_not_swapped(tmp_path: Path) -> None:
    lmm = build(tmp_path)
    names = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    vision = type(tiny.vision_config())(**names, image_size=32, patch_size=8)
    data = lmm.config.to_dict() | {"vision": config_to_dict(vision)}
    narrow = LMM.from_config(type(lmm.config).from_dict(data)).eval()
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    file = Files(export(tmp_path, narrow).mmproj)
    pixels = tiny.pixels(1)
    narrow.connector[1] = torch.nn.GELU(approximate="tanh")  # type: ignore[index]
    ours = narrow.connector(narrow.vision(pixels))[0].detach().double().numpy()
    assert np.abs(ours - image_features(file, pixels[0].double().numpy())).max() < 1e-4


# How far a weight may move, as a share of the largest one; and the logits, as a share of their
# spread (models as narrow as this one feel it far more than real ones).
@pytest.mark.parametrize(
    ("dtype", "stored", "step", "most"),
    [
        ("f32", "F32", 0.0, 0.0),
        ("f16", "F16", 1 / 2048, 5e-3),
        ("bf16", "BF16", 1 / 256, 5e-2),
        ("q8_0", "Q8_0", 1.1 / 254, 0.2),
        ("q4_0", "Q4_0", 1.1 / 8, 2.0),
    ],
)
def test_the_files_give_the_model_back(
    tmp_path: Path, dtype: str, stored: str, step: float, most: float
) -> None:
    lmm = build(tmp_path)
    out = export(tmp_path, lmm, dtype)
    tensors = GGUFTensors(lmm.config, out.language, out.mmproj)
    assert tensors.keys() == lmm.state_dict().keys()
    again = LMM.from_config(lmm.config).eval()
    again.load_state_dict(dict(tensors))
    ids = tiny.with_images([[1, 40, -1, 300, 7, 260, 99]])
    with torch.no_grad():
        ours, theirs = (model(ids, pixel_values=tiny.pixels(1)) for model in (lmm, again))
    assert float((ours - theirs).abs().max() / ours.std()) <= most
    for name, value in lmm.state_dict().items():
        assert (value - tensors[name]).abs().max() <= step * value.abs().max(), name
    types = Files(out.language).types
    assert types["blk.0.ffn_up.weight"] == stored and types["blk.0.attn_norm.weight"] == "F32"
    assert types["output.weight"] == ("Q8_0" if dtype == "q4_0" else stored)
    assert Files(out.mmproj).types["v.position_embd.weight"] == "F32"
    assert out.mmproj.name == f"mmproj-{dtype if dtype in ('f32', 'bf16') else 'f16'}.gguf"


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tied = build(tmp_path, language=config(tied=True))
    file = Files(export(tmp_path, tied).language)
    assert "output.weight" not in file.arrays
    ours = tied(torch.tensor([TEXT]))[0].detach().double().numpy()
    theirs = language_logits(file, file.arrays["token_embd.weight"][TEXT])
    assert np.abs(ours - theirs).max() < 1e-4


def test_the_vocabulary_is_told(tmp_path: Path) -> None:
    lmm = build(tmp_path, language=config(vocab=430))
    out = export(tmp_path, lmm)
    meta = Files(out.language).meta
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(meta["tokenizer.ggml.scores"]) == 430
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and types[:4] == [2, 3, 3, 6]
    assert tokens[-1] == "[PAD429]" and types[-1] == 5
    ends = [meta[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")]
    assert ends == [1, 2, 0]
    assert meta["tokenizer.ggml.add_bos_token"] and meta["tokenizer.ggml.add_space_prefix"]


def test_the_chat_template_is_ours(tmp_path: Path) -> None:
    lmm = build(tmp_path)
    text = Files(export(tmp_path, lmm).language).meta["tokenizer.chat_template"]
    assert "generation %}" not in text
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "<__media__>\nWhat?")]
    written = jinja2.Template(text).render(
        messages=[{"role": role, "content": words} for role, words in turns],
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )
    assert written == "<s>USER: Hi ASSISTANT: Yo</s>USER: <__media__>\nWhat? ASSISTANT:"


def test_what_llama_cpp_does_otherwise_is_told(tmp_path: Path) -> None:
    lmm = build(tmp_path)
    assert not any("pads every image" in note for note in export(tmp_path, lmm).notes)
    assert any("pull request 25844" in note for note in export(tmp_path, lmm).notes)
    siglip = build(tmp_path / "siglip", vision="siglip_vision_model")
    assert not any("class token" in note for note in export(tmp_path / "siglip", siglip).notes)
    for spec in ({"mode": "crop"}, {"pad_color": (0, 0, 0)}):
        assert any("pads every image" in note for note in export(tmp_path, lmm, **spec).notes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"connector": "linear"}, "the connector linear"),
        ({"vision_select": "cls_patch"}, "vision_select cls_patch"),
        ({"tiling": {"scheme": "next"}}, "tiled images"),
        ({"vision_norm": True}, "vision_norm"),
        ({"vision": {"model_type": "dinov2"}}, "the vision backbone dinov2"),
        ({"vision": {"pair": []}}, "the vision backbone a pair"),
        ({"language": {"model_type": "phi3", "hidden_act": "silu"}}, "the language model phi3"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    lmm = build(tmp_path)
    data = type(lmm.config).from_dict(lmm.config.to_dict() | change)
    with pytest.raises(PumiceError, match=told):
        write_gguf(data, lmm.state_dict(), processor(tmp_path, lmm), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    lmm = build(tmp_path)
    state = lmm.state_dict()
    lost = state.pop("language.model.model.norm.weight")
    with pytest.raises(PumiceError, match="missing: language.model.model.norm.weight"):
        write_gguf(lmm.config, state, processor(tmp_path, lmm), tmp_path / "out")
    state |= {"language.model.model.norm.weight": lost, "connector.9.weight": lost}
    with pytest.raises(PumiceError, match="left over: connector.9.weight"):
        write_gguf(lmm.config, state, processor(tmp_path, lmm), tmp_path / "out")


def test_a_value_beyond_f16_leaves_no_file(tmp_path: Path) -> None:
    lmm = build(tmp_path)
    with torch.no_grad():
        lmm.language.model.lm_head.weight[5, 3] = 1e6
    with pytest.raises(PumiceError, match="output.weight holds values up to 1e"):
        export(tmp_path, lmm, "f16")
    assert not list((tmp_path / "out").iterdir())
    export(tmp_path, lmm, "bf16")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lmm = build(tmp_path)
    monkeypatch.setitem(importlib.import_module("sys").modules, "gguf", None)
    with pytest.raises(PumiceError, match=r"pip install 'pumice\[gguf\]'"):
        export(tmp_path, lmm)


@pytest.mark.parametrize("kind", ["llama", "llama_first"])
def test_the_joining_of_pieces_is_that_of_the_tokenizer(kind: str) -> None:
    tokenizer = tokenizers_zoo.tokenizer(kind)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 3)
    assert vocabulary.first_only == (kind == "llama_first")
    for text in (*PROBES, "", "USER: the cat ASSISTANT: Yes</"):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert spm_ids(vocabulary, text) == ids, text


def merging(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer of letters and what these merges make."""
    mark = tokenizers_zoo.MARK
    pieces = ["<unk>", "<s>", "</s>", *tokenizers_zoo.BYTES, mark, *map(chr, range(33, 127))]
    vocab = {piece: index for index, piece in enumerate(pieces + ["".join(m) for m in merges])}
    backend = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_the_earlier_merge_goes_first() -> None:
    tokenizer = merging([("h", "e"), ("t", "h"), ("a", "t"), ("th", "a")])
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    split = [vocabulary.tokens[index] for index in spm_ids(vocabulary, "the that")]
    mark = tokenizers_zoo.MARK
    assert split == [mark, "t", "he", mark, "th", "at"]


def test_merges_that_scores_cannot_tell_are_refused() -> None:
    """'the' is made of th + e alone here, while llama.cpp would also join t + he."""
    tokenizer = merging([("h", "e"), ("t", "h"), ("th", "e")])
    with pytest.raises(PumiceError, match="llama.cpp would read"):
        read_vocabulary(tokenizer, len(tokenizer))


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "gpt-2"), ("qwen", "qwen2")])
def test_byte_level_tokenizers_go_by_merges(kind: str, pre: str) -> None:
    tokenizer = tokenizers_zoo.tokenizer(kind)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre)
    vocab = tokenizer.get_vocab()
    assert [vocab[token] for token in vocabulary.tokens] == list(range(len(tokenizer)))
    left, right = vocabulary.merges[0].split(" ")
    assert left + right in vocab


@pytest.mark.parametrize("kind", ["unigram", "gpt2_prefix"])
def test_a_tokenizer_without_an_equal_is_refused(kind: str) -> None:
    tokenizer = tokenizers_zoo.tokenizer(kind)
    with pytest.raises(PumiceError, match="cannot be written to GGUF"):
        read_vocabulary(tokenizer, len(tokenizer))


def test_rotary_orders_undo_each_other() -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(to_halves(to_neighbours(rows, 3), 3), rows)
    assert to_neighbours(torch.tensor([0, 2, 1, 3]), 1).tolist() == [0, 1, 2, 3]
    assert to_halves(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@needs(CHECKPOINTS, "released tokenizers")
def test_released_tokenizers_are_read_alike() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "llava-1.5-7b-hf")
    small = read_llama2c_tokenizer(DATA / "stories260k" / "tokenizer.bin")
    texts = (*PROBES, "A chat between a curious user", "1234567 ２０２６ ½ \t\t x", "ﬀ ǅ İi ß")
    for known, size in ((tokenizer, 32064), (small, 512)):
        vocabulary = read_vocabulary(known, size)
        for text in texts:
            ids = known.backend_tokenizer.encode(text, add_special_tokens=False).ids
            assert spm_ids(vocabulary, text) == ids, text
