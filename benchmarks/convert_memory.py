"""Memory and time of converting a checkpoint of LLaVA-1.5-7B's shape, made of random numbers.

    python benchmarks/convert_memory.py --dir /scratch --json

The checkpoint (14.1 GB in bfloat16, original LLaVA layout) is written to DIR, converted with
`pumice convert --to hf` in a process of its own whose memory is read every 20 ms, and removed.
`anonymous` is what the process itself holds; `resident` counts mapped pages of the files too, which
the system may drop at any time. `--blocks` makes a smaller one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from pumice.convert.keymap import LLAVA
from pumice.convert.opened import unused_vision_shapes
from pumice.convert.shards import write_shards
from pumice.models.checkpoint import model_shapes
from pumice.models.config import LMMConfig
from pumice.models.pretrained import config_to_dict

RESULT = Path(__file__).parent / "results" / "convert_memory.json"
TOWER = "openai/clip-vit-large-patch14-336"
_EVERY = 0.02

# Opens the model, answers one prompt with an image, and is done.
_OPEN = """
import sys
from pumice.convert.open import build, open_parts
from pumice.convert.parity import LMMSpeaker, make_probes
opened = open_parts(sys.argv[1])
LMMSpeaker(build(opened))(make_probes(opened.processor)[1], 2)
"""


class RandomTensors(Mapping[str, torch.Tensor]):
    """Random bfloat16 tensors of these shapes, each made when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(hash(name) % 2**31)
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        return tensor.normal_(std=shape[-1] ** -0.5, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def make(folder: Path, blocks: int) -> int:
    """Writes the checkpoint and gives the bytes of its weights."""
    folder.mkdir(parents=True)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    language = LlamaConfig(num_hidden_layers=blocks, max_position_embeddings=4096)
    config = LMMConfig(
        vision=config_to_dict(vision),
        vision_layer=-2,
        vision_select="patch",
        connector="mlp2x_gelu",
        language=config_to_dict(language),
    )
    shapes = model_shapes(config) | unused_vision_shapes(config)
    save_tokenizer(folder)
    values = {
        **language.to_dict(),
        "model_type": "llava",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": TOWER,
    }
    (folder / "config.json").write_text(json.dumps(values))
    named = {LLAVA.theirs(name): shape for name, shape in shapes.items()}
    return write_shards(folder, RandomTensors(named))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes with Llama's three special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def watched(command: list[str], size: int) -> dict[str, Any]:
    """Runs a command and gives its time and the most memory it held, in bytes and in sizes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    while process.poll() is None:
        for key, value in memory(process.pid).items():
            peaks[key] = max(peaks[key], value)
        time.sleep(_EVERY)
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} ended with {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "anonymous_bytes": peaks["RssAnon"],
        "anonymous_sizes": round(peaks["RssAnon"] / size, 3),
        "mapped_bytes": peaks["RssFile"],
        "resident_bytes": peaks["VmHWM"],
        "resident_sizes": round(peaks["VmHWM"] / size, 3),
    }


def memory(pid: int) -> dict[str, int]:
    """The memory of a running process; {} when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split(":") for line in lines if line.startswith(("RssAnon", "RssFile", "VmHWM")))
    return {key: int(value.split()[0]) * 1024 for key, value in found}


def main() -> None:
    """Makes, converts, measures, removes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where 45 GB are free")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the language model")
    parser.add_argument("--to", nargs="+", default=["pumice", "hf"])
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    root = args.dir / "convert-memory"
    if root.exists():
        sys.exit(f"{root} exists; remove it or give another --dir")
    try:
        size = make(root / "source", args.blocks)
        record: dict[str, Any] = {
            "what": f"random LLaVA-1.5 with {args.blocks} blocks of 7B's width, bfloat16",
            "weights_bytes": size,
            "machine": {"cpu": platform.processor() or platform.machine(),
                        "threads": torch.get_num_threads(), "torch": torch.__version__},
            "open": watched([sys.executable, "-c", _OPEN, str(root / "source")], size),
        }  # fmt: skip
        for to in args.to:
            base = [sys.executable, "-m", "pumice", "convert", str(root / "source")]
            record[f"convert_{to}"] = watched([*base, str(root / to), "--to", to], size)
            found = json.loads((root / to / "parity.json").read_text())["parity"]
            record[f"convert_{to}"]["parity"] = {
                against: {key: row[key] for key in ("max_logit_difference", "token_agreement")}
                for against, row in found.items()
            }
            shutil.rmtree(root / to)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    record["gigabytes"] = round(math.ceil(size / 1e8) / 10, 1)
    text = json.dumps(record, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
