"""`pumice plan`: the numbers of published models, the arithmetic, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from command_lines import code_blocks
from pumice.cli.plan import _short
from pumice.core import hub
from pumice.core.errors import PumiceError
from pumice.models import published_configs
from pumice.models.config import LMMConfig
from pumice.models.costs import (
    Counts,
    Trained,
    blank_model,
    gated_flops,
    image_costs,
    language_flops,
    shelf_names,
    training_flops,
)
from pumice.models.pretrained import config_to_dict

Run = Callable[..., tuple[int, str, str]]
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "connectors.md"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached, and nothing can be fetched."""

    def nothing(name: str, *, fetch: bool) -> None:
        if fetch:
            raise PumiceError(f"the configuration of {name!r} cannot be fetched")

    monkeypatch.setattr(published_configs, "hub_configs", nothing)


def planned(run: Run, *args: object) -> dict[str, Any]:
    code, out, err = run("plan", *args, "--json")
    assert (code, err) == (0, ""), err
    found: dict[str, Any] = json.loads(out)
    return found


def test_llava15_7b(run: Run) -> None:
    """The projector and the language model as the reference counts them."""
    found = planned(run, "llava15-7b")
    assert found["parts"] == {
        "vision": 290_909_184, "connector": 20_979_712, "gated layers": 0,
        "language": 6_738_415_616,
    }  # fmt: skip
    assert found["parameters"] == 7_050_304_512
    assert [image["tokens"] for image in found["images"]] == [576] * 3
    align, tune = found["stages"]
    assert align["trained"] == {"connector": 20_979_712}
    assert tune["trained_parameters"] == 6_738_415_616 + 20_979_712
    # Two products of 576 features: 1024 to 4096 and 4096 to 4096.
    assert found["images"][0]["connector_flops"] == 2 * 576 * 4096 * (1024 + 4096)
    shelf = {entry["name"]: entry for entry in found["connectors"] if not entry["recipe"]}
    assert list(shelf) == shelf_names()
    assert shelf["linear"]["parameters"] == 4_198_400
    assert shelf["resampler"]["parameters"] == 17_913_856
    assert (shelf["shuffle2x2+mlp2x_gelu"]["tokens"], shelf["qformer"]["tokens"]) == (144, 32)


def test_other_published_models(run: Run) -> None:
    assert planned(run, "llava15-13b")["parts"]["connector"] == 31_467_520
    assert planned(run, "llava")["parts"]["connector"] == 4_198_400
    hd = planned(run, "llava15-hd-7b")
    assert [(i["views"], i["tokens"]) for i in hd["images"]] == [(5, 1312), (7, 1696), (7, 1628)]
    # Six tiles and the whole picture; the table of connectors is that of the image too.
    shelf = {entry["name"]: entry for entry in hd["connectors"] if not entry["recipe"]}
    assert shelf["mlp2x_gelu"]["tokens"] == shelf["linear"]["tokens"] == 1696
    assert shelf["mlp2x_gelu"]["flops"] == hd["conversation"]["image"]["connector_flops"]
    # Queries of seven views and the ends of two rows of tiles; 16 x 22 merged patches, the ends of
    # their rows, and the whole picture's 8 x 8.
    assert shelf["resampler"]["tokens"] == 7 * 64 + 2
    assert shelf["shuffle2x2+mlp2x_gelu"]["tokens"] == 16 * (22 + 1) + 64
    assert shelf["gated_cross_attention"]["tokens"] == 1
    # The row end is a vector of the language model's width.
    assert hd["parts"]["connector"] == 20_979_712 + 4096
    flamingo = planned(run, "flamingo-9b")
    assert flamingo["images"][0]["tokens"] == 1 and flamingo["images"][0]["latents"] == 64
    assert flamingo["parameters"] == 8_501_437_456
    frozen = planned(run, "instructblip-7b")
    assert [list(stage["trained"]) for stage in frozen["stages"]] == [["connector"]] * 2
    refused = [entry["name"] for entry in frozen["connectors"] if "refused" in entry]
    assert refused == ["shuffle2x2+mlp2x_gelu", "average2x2+mlp2x_gelu"]


def test_lora_trains_its_adapters(run: Run) -> None:
    """r (in + out) for each of Llama's seven linear layers in 32 blocks."""
    found = planned(run, "llava15-7b-lora")["stages"][1]
    blocks = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found["trained"]["language"] == blocks


def blank(connector: str = "linear", **options: Any) -> Any:
    return blank_model(
        LMMConfig(
            vision=config_to_dict(tiny.vision_config()),
            vision_layer=-2,
            vision_select="patch",
            connector=connector,
            connector_options=options,
            language=config_to_dict(tiny.language_config(100)),
        )
    )


def test_the_arithmetic_by_hand() -> None:
    """A Llama of 2 blocks, width 32, 4 heads of 8, 2 of keys, feed-forward of 64, 100 words."""
    lmm = blank()
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 32 * 100
    for positions in (1, 7):
        attention = 2 * 2 * 2 * positions**2 * 32
        assert language_flops(lmm, positions) == 2 * weights * positions + attention
    (image,) = image_costs(lmm, [(50, 20)])
    assert (image.views, image.tokens, image.connector_flops) == (1, 16, 2 * 16 * 32 * 32)


def test_gated_layers_by_hand() -> None:
    """One layer before block 0: query and out, key and value of 3 latents, scores, feed-forward."""
    options = {"queries": 3, "depth": 1, "heads": 2, "head_width": 8, "every": 2}
    lmm = blank("gated_cross_attention", **options)
    positions, latents = 7, 3
    own = 2 * positions * (2 * 32 * 32 + 2 * 32 * 128)
    assert gated_flops(lmm, positions, latents) == (
        own + 2 * latents * 2 * 32 * 32 + 2 * 2 * positions * latents * 32
    )
    assert gated_flops(blank(), positions, latents) == 0
    # They hang on the language model's blocks and are not counted with it again.
    assert language_flops(lmm, positions) == language_flops(blank(), positions)


@pytest.mark.parametrize(
    ("trained", "times"),
    [
        (Trained(vision=False, connector=True, language=False), (1, 3, 3, 2)),
        (Trained(vision=False, connector=True, language=True), (1, 3, 3, 3)),
        (Trained(vision=True, connector=True, language=True), (3, 3, 3, 3)),
        (Trained(vision=False, connector=True, language=True, adapters=True), (1, 3, 3, 2)),
        (Trained(vision=False, connector=False, language=True), (1, 1, 2, 3)),
    ],
)
def test_what_the_backward_pass_adds(trained: Trained, times: tuple[int, ...]) -> None:
    counts = Counts(1, 10, 100, 1000)
    expected = sum(n * flops for n, flops in zip(times, counts, strict=True))
    assert training_flops(counts, trained) == expected


def test_the_text_and_its_options(run: Run) -> None:
    code, out, err = run("plan", "pocket-hd", "--image", "100x50", "--text-tokens", 9)
    assert (code, err) == (0, "")
    assert "One conversation: 100 x 50 and 9 tokens of text" in out
    assert "row" not in out.split("\n")[0] and "mlp2x_gelu *" in out
    # Numbers stand below each other.
    rows = [line for line in out.splitlines() if line.startswith(("vision ", "language  "))]
    assert len({row.rindex(re.findall(r"\S+", row)[1]) for row in rows}) <= len(rows)
    more = planned(run, "pocket", "model.connector=resampler", "--text-tokens", 9)
    assert more["conversation"]["tokens"] == 64 + 9
    assert [e["name"] for e in more["connectors"] if e["recipe"]] == ["resampler"]


@pytest.mark.parametrize(
    ("flops", "shown"),
    [(7, "7"), (999, "999"), (1000, "1.00 k"), (13_214_154_752, "13.2 G"), (999_600, "1.00 M"),
     (24_159_191_040, "24.2 G"), (366_033_858_560, "366 G"), (9_996_000, "10.0 M")],
)  # fmt: skip
def test_three_digits(flops: int, shown: str) -> None:
    assert _short(flops) == shown


def test_what_cannot_be_planned_is_refused(run: Run, tmp_path: Path) -> None:
    for args, said in [
        (("pocket", "--image", "big"), "width and height in pixels are needed"),
        (("pocket", "model.connector=mlpx"), "connector 'mlpx' is unknown"),
        (("pocket", "model.vision=someone/some-vit"), "'someone/some-vit' cannot be fetched"),
        (("pocket", "model.vision=nowhere"), "backbone 'nowhere' is unknown"),
    ]:
        code, out, err = run("plan", *args)
        assert (code, out) == (2, "") and said in err and "Traceback" not in err, err


def test_a_folder_needs_its_config_alone(run: Run, tmp_path: Path) -> None:
    for path in (tiny.vision_folder(tmp_path / "v"), tiny.language_folder(tmp_path / "l")):
        (path / "model.safetensors").unlink()
    changes = [f"model.vision={tmp_path / 'v'}", f"model.language={tmp_path / 'l'}"]
    assert planned(run, "pocket", *changes)["parts"]["connector"] == 32 * 32 * 2 + 64


def test_configs_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache, half filled or not; else the two small files alone."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    asked: list[Any] = []

    def download(name: str, **settings: Any) -> str:
        asked.append(settings)
        if settings.get("local_files_only") and not (tmp_path / "config.json").is_file():
            raise LocalEntryNotFoundError("nothing")
        if not settings.get("local_files_only"):
            raise OfflineModeIsEnabled("offline mode is enabled.")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.hub_configs("a/b", fetch=False) is None
    with pytest.raises(PumiceError, match=r"configuration of 'a/b' .* offline mode is enabled\. G"):
        hub.hub_configs("a/b", fetch=True)
    assert asked[-1] == {"allow_patterns": ["config.json", "preprocessor_config.json"]}
    (tmp_path / "config.json").write_text("{}")
    assert hub.hub_configs("a/b", fetch=True) == tmp_path


def test_the_tables_of_the_document(run: Run) -> None:
    """Every `pumice plan` command shown with its output gives that output."""
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = code_blocks(text, "text")
    shown = [block for block in blocks if block.startswith("$ pumice plan ")]
    assert len(shown) >= 2
    for block in shown:
        command, *lines = block.rstrip().splitlines()
        output = run(*command.removeprefix("$ pumice ").split())[1].splitlines()
        start = output.index(lines[0])
        assert output[start : start + len(lines)] == lines, command
