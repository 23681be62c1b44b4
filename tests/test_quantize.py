"""8 and 4 bits: how far the weights are, what is left alone, training through them, loading."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from conftest import Run
from pumice.core.errors import PumiceError
from pumice.infer.model import load
from pumice.models.checkpoint import load_lmm, save_checkpoint
from pumice.models.language import LanguageModel
from pumice.models.lora import LoraSpec, adapter_parameters, add_lora, merge_lora
from pumice.models.quantize import (
    METHODS,
    Method,
    QuantizedLinear,
    merged,
    pack_for_cpu,
    quantize_language,
    quantized_as,
    quantized_layers,
)
from pumice.train.metrics import part_hash

LEAVES = set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
each_method = pytest.mark.parametrize("method", METHODS)


def layer(method: Method, inputs: int = 128, outputs: int = 48, bias: bool = False) -> tuple:  # type: ignore[type-arg]
    """A quantised layer and the weight it was filled with."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    made = QuantizedLinear(inputs, outputs, bias, method).eval()
    made.fill(weight, torch.randn(outputs) if bias else None)
    return made, weight


@each_method
@pytest.mark.parametrize("inputs", [256, 192, 96])
def test_no_weight_is_further_off_than_half_a_step(method: Method, inputs: int) -> None:
    made, weight = layer(method, inputs)
    error = (made.dequantized() - weight).abs()
    if method == "int8":
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert (error <= step * 0.501).all()
        return
    assert made.group == {256: 128, 192: 64, 96: 32}[inputs]
    groups = weight.view(len(weight), -1, made.group)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    # Scale and middle are kept in bfloat16: 1/256 of the range, at both ends.
    bound = (step * (0.5 + 15 / 256 + 0.02)).unsqueeze(-1)
    assert (error.view_as(groups) <= bound).all()
    assert made.weight.nbytes == weight.nbytes // 8


@each_method
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_stored_weight(
    method: Method, rows: int, dtype: torch.dtype, bias: bool
) -> None:
    made, _ = layer(method, bias=bias)
    made.to(dtype)
    assert made.scale.dtype == (torch.float32 if method == "int8" else torch.bfloat16)
    x = torch.randn(rows, 3, 128, dtype=dtype)
    wanted = x.float() @ made.dequantized().t() + (made.bias.float() if bias else 0)
    bound = 2e-4 if dtype == torch.float32 else 1e-2
    for _ in range(2):
        with torch.no_grad():
            got = made(x)
        assert got.dtype == dtype and got.shape == (rows, 3, 48)
        assert (got.float() - wanted).norm() <= bound * wanted.norm()
        # Packed for the CPU, int4 multiplies in bfloat16.
        made.pack()
        bound = 1e-2 if method == "int4" else bound
    assert made.packed


@pytest.mark.parametrize("packed", [False, True])
def test_an_int8_product_does_not_depend_on_its_neighbours(packed: bool) -> None:
    made, _ = layer("int8")
    x = torch.randn(5, 128)
    if packed:
        made.pack()
    with torch.no_grad():
        alone = torch.cat([made(row.unsqueeze(0)) for row in x])
        assert torch.equal(made(x), alone)
        x[1] = 0
        assert torch.equal(made(x)[1], torch.zeros(48))


@each_method
def test_gradients_reach_the_input(method: Method) -> None:
    made, _ = layer(method)
    x = torch.randn(4, 128, requires_grad=True)
    wanted = torch.randn(4, 48)
    (made(x) * wanted).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, wanted @ made.dequantized(), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_packed_layers_answer_only() -> None:
    made, _ = layer("int4")
    made.pack()
    x = torch.randn(1, 128, requires_grad=True)
    for misuse in (lambda: made(x), lambda: made.to("meta"), made.dequantized):
        with pytest.raises(PumiceError, match="packed for answering on the CPU"):
            misuse()
    odd, _ = layer("int4", outputs=40)
    odd.pack()
    assert not odd.packed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.language_folder(tmp_path / "language", tied=False)


def embeds() -> torch.Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))


@each_method
def test_only_the_decoder_s_linear_layers_change(folder: Path, method: Method) -> None:
    plain = LanguageModel.from_folder(folder).eval()
    language = LanguageModel.from_folder(folder).eval()
    assert quantized_as(language) is None
    quantize_language(language, method)
    assert quantized_as(language) == method
    found = {n for n, m in language.named_modules() if isinstance(m, QuantizedLinear)}
    assert {name.split(".")[-1] for name in found} == LEAVES and len(found) == 14
    before = dict(plain.named_parameters())
    kept = dict(language.named_parameters())
    assert kept.keys() == {n for n in before if n.removesuffix(".weight") not in found}
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    with torch.no_grad():
        one, two = plain(embeds()), language(embeds())
    spread = one.std()
    assert (one - two).abs().mean() < (0.03 if method == "int8" else 0.5) * spread
    with pytest.raises(PumiceError, match=f"quantised already \\({method}\\)"):
        quantize_language(language, method)


@each_method
def test_adapters_learn_on_a_quantised_base_and_merge_into_the_full_one(
    folder: Path, method: Method
) -> None:
    spec = LoraSpec(r=4, alpha=8.0)
    language = LanguageModel.from_folder(folder)
    quantize_language(language, method)
    stored = [buffer.clone() for buffer in language.buffers()]
    torch.manual_seed(0)
    add_lora(language, spec)
    optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(language)], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = language(embeds()).logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(a, b) for a, b in zip(stored, language.buffers(), strict=True))
    with pytest.raises(PumiceError, match=f"full precision only, and the base model is {method}"):
        merge_lora(language)

    full = LanguageModel.from_folder(folder)
    add_lora(full, spec)
    learnt = dict(adapter_parameters(language))
    with torch.no_grad():
        for name, parameter in adapter_parameters(full):
            parameter.copy_(learnt[name])
        adapted = full.eval()(embeds())
        merge_lora(full)
        assert (full(embeds()) - adapted).abs().max() < 1e-4


def test_what_cannot_be_quantised_is_told(folder: Path) -> None:
    language = LanguageModel.from_folder(folder)
    language.model.model.layers[0].mlp.up_proj = torch.nn.Linear(24, 64)
    with pytest.raises(PumiceError, match="up_proj cannot be quantised.*24 inputs. Use int8"):
        quantize_language(language, "int4")
    with pytest.raises(PumiceError, match="'int5' is unknown; known: int8, int4"):
        load("pocket", quantize="int5")
    made, _ = layer("int8")
    with pytest.raises(PumiceError, match=r"\(3, 3\) does not fit"):
        made.fill(torch.zeros(3, 3))


class Counted(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors; notes how many it gave out were alive at once."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        self.given: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.most = max(self.most, sum(entry() is not None for entry in self.given))
        tensor = self.tensors[name].clone()
        self.given.append(weakref.ref(tensor))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@each_method
def test_loading_takes_one_tensor_after_the_other(root: Path, method: Method) -> None:
    plain = load_lmm(root / "model")
    quantize_language(plain.language, method)
    tensors = Counted(root / "model" / "model.safetensors")
    for given in (None, tensors):
        lmm = load_lmm(root / "model", quantize=method, tensors=given)
        state, wanted = lmm.state_dict(), plain.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in state)
    assert tensors.most <= 1
    for part in ("vision", "connector"):
        own = getattr(load_lmm(root / "model"), part)
        assert part_hash(getattr(lmm, part)) == part_hash(own)


def test_a_misfit_is_told_while_quantising(root: Path) -> None:
    tensors = load_file(root / "model" / "model.safetensors")
    name = "language.model.model.layers.0.mlp.up_proj.weight"
    with pytest.raises(PumiceError, match=r"up_proj.weight is \(3, 3\), expected \(64, 32\)"):
        load_lmm(root / "model", quantize="int8", tensors=tensors | {name: torch.zeros(3, 3)})
    del tensors[name]
    with pytest.raises(PumiceError, match=f"missing: {name}"):
        load_lmm(root / "model", quantize="int8", tensors=tensors)


@each_method
def test_a_quantised_model_answers_and_cannot_be_saved(
    root: Path, tmp_path: Path, run: Run, method: Method
) -> None:
    model = load(root / "model", quantize=method)
    assert len(quantized_layers(model.lmm)) == 15  # the head among them
    images = [root / "0.png"]
    result = model.ask("what is in a?", images, max_new_tokens=8)
    streamed = "".join(model.stream("what is in a?", images, max_new_tokens=8))
    assert result.new_tokens > 0 and streamed.strip() == result.text.strip()
    code, out, _ = run(
        "ask", root / "model", "what is in a?", "--image", images[0], "--quantize", method,
        "--max-new-tokens", "8",
    )  # fmt: skip
    assert code == 0 and out.strip() == result.text.strip()
    with pytest.raises(PumiceError, match=f"quantised \\({method}\\); a checkpoint holds full"):
        save_checkpoint(tmp_path / "m", model.lmm, None, {})
    half = load(root / "model", dtype="bfloat16", quantize=method)
    assert half.ask("what is in a?", images, max_new_tokens=8).new_tokens > 0


def test_the_command_refuses_an_unknown_method(root: Path, run: Run) -> None:
    code, _, err = run("ask", root / "model", "what?", "--quantize", "int3")
    assert code == 2 and "known: int8, int4" in err


def test_pack_for_cpu_leaves_a_model_in_full_precision_alone(folder: Path) -> None:
    language = LanguageModel.from_folder(folder)
    pack_for_cpu(language)
    assert not quantized_layers(language)


def test_packed_int8_codes_come_back() -> None:
    made, _ = layer("int8", bias=True)
    codes, weight = made.weight.clone(), made.dequantized()
    x = torch.randn(3, 128)
    with torch.no_grad():
        plain = made(x)
        made.pack()
        assert made.packed and made.weight.numel() == 0
        packed = made(x)
    assert torch.equal(made.codes, codes) and torch.equal(made.dequantized(), weight)
    # Both are the exact product to what their digits leave out.
    assert (packed - plain).norm() <= 3e-4 * plain.norm()
    made.to(torch.float32)
    assert not made.packed and torch.equal(made.weight, codes)


def test_packed_for_the_cpu_the_head_is_int8_too(root: Path) -> None:
    for method in METHODS:
        lmm = load_lmm(root / "model", quantize=method)
        head = lmm.language.model.lm_head.weight.detach().clone()  # type: ignore[union-attr]
        pack_for_cpu(lmm.language)
        made = lmm.language.model.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(made, QuantizedLinear) and made.method == "int8"
        step = head.abs().amax(dim=1, keepdim=True) / 127
        assert ((made.dequantized() - head).abs() <= step * 0.501).all()
        # The embeddings that the head was tied to are what they were.
        assert torch.equal(lmm.language.token_embeddings, head)
        assert all(layer.packed for layer in quantized_layers(lmm))


def test_merged_layers_say_what_each_says() -> None:
    layers = [layer("int8", outputs=size, bias=True)[0] for size in (32, 16, 48)]
    for made in layers:
        made.pack()
    order = torch.randperm(96)
    x = torch.randn(4, 128)
    with torch.no_grad():
        wanted = torch.cat([made(x) for made in layers], -1)[:, order]
        assert torch.equal(merged(layers, order)(x), wanted)
