"""Language models of llama2.c (karpathy's TinyStories models among them) as Hugging Face folders.

A model of llama2.c is two files: the weights, one float32 array after the other behind a short
header, and `tokenizer.bin`. The header tells versions apart: version 0 starts with the sizes,
version 1 with the letters "ak42". Rotary pairs are neighbours there and halves in Hugging Face.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pumice.convert.rotary import to_halves
from pumice.core.errors import PumiceError
from pumice.core.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer.bin"
SPACE = "\u2581"
_MAGIC = b"24ka"  # "ak42" as a little-endian number
_HEADER_1 = 256
_FIRST_PIECE = 259  # after <unk>, <s>, </s> and the 256 bytes
_PER_BLOCK = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "wq",
    "self_attn.k_proj": "wk",
    "self_attn.v_proj": "wv",
    "self_attn.o_proj": "wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "w1",
    "mlp.down_proj": "w2",
    "mlp.up_proj": "w3",
}


@dataclass(frozen=True)
class Llama2cSizes:
    """The header of a checkpoint; `start` is where the weights begin, in bytes."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    tied: bool
    version: int
    start: int

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """The arrays in the order of the file, each with its shape."""
        dim, hidden, layers = self.dim, self.hidden, self.layers
        keys = dim // self.heads * self.kv_heads
        embedding = {"tok_embeddings": (self.vocab, dim)}
        attention_norm, ffn_norm = {"attention_norm": (layers, dim)}, {"ffn_norm": (layers, dim)}
        attention = {
            "wq": (layers, dim, dim),
            "wk": (layers, keys, dim),
            "wv": (layers, keys, dim),
            "wo": (layers, dim, dim),
        }
        mlp = {
            "w1": (layers, hidden, dim),
            "w2": (layers, dim, hidden),
            "w3": (layers, hidden, dim),
        }
        norm = {"norm": (dim,)}
        head: dict[str, tuple[int, ...]] = {} if self.tied else {"output": (self.vocab, dim)}
        if self.version == 1:
            return {**attention_norm, **ffn_norm, **norm, **embedding, **attention, **mlp, **head}
        # Version 0 also holds the tables of cosines and sines, which anyone can compute.
        tables = {
            f"rotary_{part}": (self.context, dim // self.heads // 2) for part in ("cos", "sin")
        }
        return {
            **embedding,
            **attention_norm,
            **attention,
            **ffn_norm,
            **mlp,
            **norm,
            **tables,
            **head,
        }

    @property
    def size(self) -> int:
        """How many bytes the whole file has."""
        return self.start + 4 * sum(math.prod(shape) for shape in self.arrays().values())


def is_llama2c(directory: Path | str) -> bool:
    """Whether a directory (or a checkpoint file in it) is a llama2.c model, by its content."""
    path = Path(directory)
    return bool(_checkpoints(path)) and (_folder(path) / TOKENIZER).is_file()


def convert_llama2c(src: Path | str, dst: Path | str) -> Path:
    """Writes the llama2.c model `src` as a Hugging Face folder (LlamaForCausalLM) and gives `dst`.

    `src` is a directory with a checkpoint and its tokenizer.bin, or the checkpoint file itself.
    """
    from safetensors.torch import save_file

    src, dst = Path(src), Path(dst)
    path = _checkpoint(src)
    tokenizer = read_llama2c_tokenizer(_folder(src) / TOKENIZER)
    sizes = read_header(path)
    assert sizes is not None  # _checkpoint gives only files that have one
    if len(tokenizer) != sizes.vocab:
        raise PumiceError(
            f"{path} has {sizes.vocab} rows of embedding and {TOKENIZER} {len(tokenizer)} tokens; "
            f"they belong to different models. Take the tokenizer.bin of the model's training."
        )
    dst.mkdir(parents=True, exist_ok=True)
    save_file(read_llama2c(path), dst / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(dst)
    write_json(dst / "config.json", _config(sizes))
    # Texts follow each other in training with <s> between them, so it ends a text as well.
    ends = {"bos_token_id": 1, "eos_token_id": [1, 2]}
    write_json(dst / "generation_config.json", ends)
    return dst


def read_header(path: Path) -> Llama2cSizes | None:
    """The sizes of a checkpoint file; None for a file that is no float32 checkpoint of llama2.c."""
    with path.open("rb") as file:
        head = file.read(_HEADER_1)
    if len(head) < 37:
        return None
    if head[:4] == _MAGIC:
        version, *sizes, shared = struct.unpack("<i7iB", head[4:37])
        if version == 2:
            raise PumiceError(
                f"{path} is an int8 checkpoint of llama2.c (version 2); float32 ones (versions 0 "
                f"and 1) are read. Export the model again with --version 1."
            )
        found = _sizes(sizes, tied=bool(shared), version=version, start=_HEADER_1)
    else:
        # A vocabulary below zero says that the output layer has weights of its own.
        *rest, vocab, context = struct.unpack("<7i", head[:28])
        found = _sizes([*rest, abs(vocab), context], tied=vocab > 0, version=0, start=28)
    return found if found is not None and found.size == path.stat().st_size else None


def read_llama2c(path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under Hugging Face's names, rotary rows in halves; float32."""
    path = Path(path)
    sizes = read_header(path)
    if sizes is None:
        raise PumiceError(
            f"{path} is no whole llama2.c checkpoint: its length is not what its header says. "
            f"Download or export it again."
        )
    data = np.fromfile(path, dtype="<f4", offset=sizes.start)
    arrays: dict[str, torch.Tensor] = {}
    at = 0
    for name, shape in sizes.arrays().items():
        count = math.prod(shape)
        arrays[name] = torch.from_numpy(data[at : at + count].reshape(shape))
        at += count
    tensors = {
        "model.embed_tokens.weight": arrays["tok_embeddings"],
        "model.norm.weight": arrays["norm"],
    }
    if not sizes.tied:
        tensors["lm_head.weight"] = arrays["output"]
    turned = {"wq": sizes.heads, "wk": sizes.kv_heads}
    for block in range(sizes.layers):
        for ours, theirs in _PER_BLOCK.items():
            value = arrays[theirs][block]
            if theirs in turned:
                value = to_halves(value, turned[theirs])
            tensors[f"model.layers.{block}.{ours}.weight"] = value.contiguous()
    return tensors


def read_llama2c_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer of a tokenizer.bin, with the ids llama2.c's own encoder gives.

    llama2.c joins the neighbours whose result has the best score, so the merges are every way to
    put two pieces together, best result first. U+2581 in a text counts as a space, as it does for
    sentencepiece; llama2.c alone would spell it in bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces, scores = _read_pieces(Path(path))
    special = ["<unk>", "<s>", "</s>"]
    # In the file the two are spelled with line breaks around them, for printing.
    names = special + [piece.replace(" ", SPACE) for piece in pieces[len(special) :]]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [
        (-scores[index], cut, name[:cut], name[cut:])
        for name, index in vocab.items()
        if index >= _FIRST_PIECE
        for cut in range(len(name) - 1, 0, -1)
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    # Of equal results the leftmost is joined first by llama2.c, so longer left parts go first.
    merges.sort(key=lambda merge: (merge[0], -merge[1]))
    pairs = [(left, right) for _, _, left, right in merges]
    backend = Tokenizer(BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _read_pieces(path: Path) -> tuple[list[str], list[float]]:
    data = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    at = 4  # past the length of the longest piece
    try:
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if length < 0 or at + length > len(data):
                raise ValueError(f"a piece of {length} bytes at byte {at}")
            pieces.append(data[at : at + length].decode("utf-8"))
            scores.append(score)
            at += length
    except (struct.error, ValueError) as error:
        raise PumiceError(
            f"{path} is no whole tokenizer.bin of llama2.c: {error}. Download or export it again."
        ) from error
    if len(pieces) < _FIRST_PIECE or pieces[3] != "<0x00>" or pieces[258] != "<0xFF>":
        raise PumiceError(
            f"{path} holds {len(pieces)} tokens and not the 256 bytes at 3 to 258; a tokenizer.bin "
            f"of llama2.c is needed. Export it again with llama2.c's tokenizer.py."
        )
    return pieces, scores


def _sizes(numbers: list[int], *, tied: bool, version: int, start: int) -> Llama2cSizes | None:
    dim, hidden, layers, heads, kv_heads, vocab, context = numbers
    if min(numbers) < 1 or version not in (0, 1) or dim % heads or heads % kv_heads:
        return None
    return Llama2cSizes(dim, hidden, layers, heads, kv_heads, vocab, context, tied, version, start)


def _config(sizes: Llama2cSizes) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": sizes.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _checkpoints(path: Path) -> dict[int, list[Path]]:
    """Version -> the checkpoint files of that version."""
    files = [path] if path.is_file() else sorted(path.glob("*.bin")) if path.is_dir() else []
    found: dict[int, list[Path]] = {}
    for file in files:
        sizes = read_header(file)
        if sizes is not None:
            found.setdefault(sizes.version, []).append(file)
    return found


def _checkpoint(src: Path) -> Path:
    found = _checkpoints(src)
    if not found:
        held = sorted(entry.name for entry in src.iterdir())[:8] if src.is_dir() else []
        raise PumiceError(
            f"{src} holds no llama2.c checkpoint (found: {', '.join(held) or 'nothing'}); a .bin "
            f"file whose header fits its length is needed, and its {TOKENIZER} beside it."
        )
    # The same weights are often given in both versions; the newer says more of itself.
    files = found[max(found)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise PumiceError(f"{src} holds several llama2.c checkpoints ({names}); give one of them.")
    return files[0]
