"""A new model's connector filled from released weights in place of new ones.

Two kinds of sources: an InstructBLIP, whose Q-Former is taken without its projection; and a model
or a stage's checkpoint whose connector has the same shapes: pumice's, LLaVA's in any of its
layouts, or LLaVA's `mm_projector.bin` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pumice.convert import huggingface, instructblip, llava
from pumice.convert.keymap import LLAVA, find_hf_layout
from pumice.convert.opened import Facts
from pumice.core.errors import PumiceError
from pumice.models.checkpoint import FORMAT
from pumice.models.connectors.qformer import QFormer
from pumice.models.tensor_files import RenamedTensors, TensorFiles, shape_of

if TYPE_CHECKING:
    from pumice.models.lmm import LMM

# What belongs to the connector as a stage trains it; the first must be there in full.
_OWN = ("connector.", "cross_attention.", "row_end")
_QFORMER = ("query_tokens", "qformer.")


def load_connector(lmm: LMM, source: Path) -> bool:
    """Fills the connector of `lmm` from a directory, or from a file of weights.

    Gives whether all of it came from there; of an InstructBLIP the projection to the language
    model stays new, for that belongs to the other language model. Gated layers are filled too, and
    row ends where the source has them. Weights that do not fit are an error and change nothing; a
    model on the meta device is only checked.
    """
    if source.is_dir() and instructblip.detect(Facts.of(source).config):
        _load_qformer(lmm, source)
        return False
    tensors = _connector_tensors(source)
    state = {name: t for name, t in lmm.state_dict().items() if name.startswith(_OWN)}
    _check(lmm, state, tensors, source)
    with torch.no_grad():
        for name, own in state.items():
            if name in tensors and not own.is_meta:
                own.copy_(tensors[name])
    return True


def reads_bert_instructions(source: Path) -> bool:
    """Whether a connector from there reads the instruction with the tokenizer beside it."""
    return source.is_dir() and instructblip.detect(Facts.of(source).config)


def _load_qformer(lmm: LMM, source: Path) -> None:
    connector = lmm.connector
    if not isinstance(connector, QFormer):
        raise PumiceError(
            f"{source} is an InstructBLIP and holds a qformer, but the connector is "
            f"{lmm.connector_name!r}. Set connector to qformer, or connector_from to weights of a "
            f"{lmm.connector_name}."
        )
    files = TensorFiles.of_folder(source)
    shapes = {name: _shape(files, name) for name in files if name.startswith(_QFORMER)}
    blank = connector.query_tokens.is_meta

    def read(name: str) -> torch.Tensor:
        return torch.empty(shapes[name], device="meta") if blank else files[name]

    instructblip.load_qformer_weights(connector, shapes, read)


def _connector_tensors(source: Path) -> Mapping[str, torch.Tensor]:
    """The connector's tensors of a source under the names of an LMM; they stay on disk."""
    if source.is_file():
        return _own_part(_named_as_llava(TensorFiles([source])))
    facts = Facts.of(source)
    if facts.config.get("format") == FORMAT:
        files = TensorFiles.of_folder(source)
        return _own_part(RenamedTensors(files, {name: name for name in files}))
    if llava.PROJECTOR in facts.files:
        return _own_part(_named_as_llava(TensorFiles([source / llava.PROJECTOR])))
    if huggingface.detect(facts):
        files = TensorFiles.of_folder(source)
        return _own_part(RenamedTensors(files, find_hf_layout(files).read(files)))
    if llava.detect(facts):
        return _own_part(_named_as_llava(TensorFiles.of_folder(source)))
    raise PumiceError(
        f"connector_from is {source}, which holds no connector that is known (found: "
        f"{', '.join(sorted(facts.files)[:8]) or 'nothing'}). Give a pumice checkpoint, a LLaVA "
        f"directory, {llava.PROJECTOR} or its directory, or an InstructBLIP."
    )


def _named_as_llava(files: TensorFiles) -> RenamedTensors:
    """Files in original LLaVA's names, or in ours already."""
    if all(name.startswith(_OWN) for name in files):
        return RenamedTensors(files, {name: name for name in files})
    return RenamedTensors(files, LLAVA.read(files))


def _own_part(tensors: RenamedTensors) -> RenamedTensors:
    return RenamedTensors(tensors, {name: name for name in tensors if name.startswith(_OWN)})


def _check(
    lmm: LMM,
    state: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    source: Path,
) -> None:
    """Every tensor of the connector is there in its shape, and none is left over."""
    # Row ends are one vector, which a model may have new, or have no place for.
    own, theirs = ({name for name in names if name != "row_end"} for names in (state, tensors))
    wrong = [
        f"{name} is {_shape(tensors, name)}, needed {tuple(state[name].shape)}"
        for name in state
        if name in tensors and _shape(tensors, name) != tuple(state[name].shape)
    ]
    faults = [
        ", ".join(names[:4]) + (f" (+{len(names) - 4} more)" if len(names) > 4 else "")
        for names in (
            wrong,
            [f"{name} is missing" for name in sorted(own - theirs)],
            [f"{name} has no place" for name in sorted(theirs - own)],
        )
        if names
    ]
    if faults:
        raise PumiceError(
            f"the connector in {source} does not fit a {lmm.connector_name} from "
            f"{lmm.connector.sizes.in_dim} to {lmm.connector.sizes.out_dim}: {'; '.join(faults)}. "
            f"Give connector and connector_options as they were trained, with backbones of the "
            f"same widths, or leave connector_from out."
        )


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    return shape_of(tensors, name) or tuple(tensors[name].shape)
