"""The shelf of connectors: shapes, gradients, masks, options, cost; Q-Former parity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from pumice.core.errors import PumiceError
from pumice.models.connectors import (
    CONNECTORS,
    REDUCTIONS,
    Connector,
    Instruction,
    build_connector,
    connector_cost,
)
from pumice.models.connectors.reduction import merge_blocks
from pumice.models.connectors.resampler import sincos_2d

IN, OUT, P, VOCAB = 8, 12, 16, 20
SMALL: dict[str, dict[str, Any]] = {
    "resampler": {"queries": 5, "width": 16, "heads": 2},
    "qformer": {"queries": 5, "width": 16, "heads": 2, "depth": 3, "hidden": 24, "dropout": 0.0},
}
SHELF = [
    *(name.replace("N", "2") for name in CONNECTORS if name in ("linear", "mlpNx_gelu", *SMALL)),
    *(f"{merge}+{inner}" for merge in REDUCTIONS for inner in ("mlp2x_gelu", *SMALL)),
]
each_connector = pytest.mark.parametrize("name", SHELF)


def build(name: str, patches: int = P, **options: Any) -> Connector:
    torch.manual_seed(0)
    known = SMALL.get(name.split("+")[-1], {})
    return build_connector(name, IN, OUT, patches, {**known, **options}, vocab_size=VOCAB)


def features(views: int = 3, patches: int = P) -> torch.Tensor:
    return torch.randn(views, patches, IN, generator=torch.Generator().manual_seed(1))


def instruction(views: int = 3, length: int = 4) -> Instruction:
    ids = torch.arange(views * length).view(views, length) % VOCAB
    return Instruction(ids, torch.ones_like(ids, dtype=torch.bool))


# every connector


@each_connector
def test_shape_is_as_told(name: str) -> None:
    connector = build(name)
    tokens = connector(features(), None, instruction())
    assert tokens.shape == (3, connector.num_tokens, OUT)
    assert connector.side is None or connector.side**2 == connector.num_tokens
    assert (connector.side is None) == ("former" in name or "resampler" in name)
    assert connector.wants_instruction == name.endswith("qformer")


@each_connector
def test_every_weight_gets_a_gradient(name: str) -> None:
    connector = build(name)
    connector(features(), None, instruction()).square().sum().backward()
    idle = [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of the keys moves all scores of a query alike.
    assert [n for n in idle if not n.endswith("key.bias")] == []


@each_connector
def test_views_do_not_see_each_other(name: str) -> None:
    connector = build(name).eval()
    whole = connector(features(), None, instruction())
    for i in range(3):
        ids, mask = instruction()
        alone = connector(features()[i : i + 1], None, Instruction(ids[i : i + 1], mask[i : i + 1]))
        torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-6, rtol=1e-5)


@each_connector
def test_the_last_linear_layer_writes_the_tokens(name: str) -> None:
    connector = build(name).eval()
    before = connector(features(), None, instruction())
    last = [m for m in connector.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(3)
        last.bias.mul_(3)
    torch.testing.assert_close(connector(features(), None, instruction()), 3 * before)


@each_connector
def test_all_but_the_learnt_is_in_the_options(name: str) -> None:
    connector = build(name).eval()
    again = build_connector(name, IN, OUT, P, connector.options, vocab_size=VOCAB + 1).eval()
    again.load_state_dict(connector.state_dict())
    given = (features(), None, instruction())
    assert torch.equal(again(*given), connector(*given))
    assert again.options == connector.options


@each_connector
def test_half_precision_and_autocast(name: str) -> None:
    connector = build(name)
    given = features()
    exact = connector(given, None, instruction())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = connector(given, None, instruction())
    half = copy.deepcopy(connector).bfloat16()(given.bfloat16(), None, instruction())
    for rough in (cast, half):
        assert (rough.float() - exact).norm() < 0.1 * exact.norm()


# masks


@pytest.mark.parametrize(
    ("name", "prefix"),
    # Behind a merge there is no prefix: it needs the grid alone.
    [("resampler", 0), ("resampler", 1), ("qformer", 0), ("qformer", 1),
     ("average2x2+resampler", 0)],
)  # fmt: skip
def test_queries_look_at_picture_only(name: str, prefix: int) -> None:
    connector = build(name, P + prefix).eval()
    given = features(patches=P + prefix)
    mask = torch.zeros(3, P, dtype=torch.bool)
    mask.view(3, 4, 4)[:, :2] = True  # the upper half holds picture
    masked = connector(given, mask, instruction())
    spoilt = given.clone()
    spoilt[:, prefix + P // 2 :] = 7
    assert torch.equal(connector(spoilt, mask, instruction()), masked)
    assert not torch.allclose(connector(given, None, instruction()), masked, atol=1e-4)
    if prefix:
        spoilt[:, 0] = 7
        assert not torch.allclose(connector(spoilt, mask, instruction()), masked, atol=1e-4)


@pytest.mark.parametrize("name", ["average2x2+resampler", "shuffle2x2+qformer"])
def test_a_merged_patch_with_some_picture_is_seen(name: str) -> None:
    connector = build(name).eval()
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :3, :2] = True  # the lower left block is half picture, the right ones are padding
    whole_blocks = mask.clone()
    whole_blocks[:, 3, :2] = True
    masked = connector(features(), mask.flatten(1), instruction())
    assert torch.equal(connector(features(), whole_blocks.flatten(1), instruction()), masked)
    assert not torch.allclose(connector(features(), None, instruction()), masked, atol=1e-4)


@pytest.mark.parametrize("name", ["resampler", "qformer"])
def test_a_view_of_pure_padding_gives_numbers(name: str) -> None:
    tokens = build(name)(features(), torch.zeros(3, P, dtype=torch.bool), instruction())
    assert tokens.isfinite().all()


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu", "shuffle2x2+mlp2x_gelu"])
def test_connectors_of_single_patches_ignore_mask_and_instruction(name: str) -> None:
    connector, mask = build(name), torch.rand(3, P) < 0.5
    assert torch.equal(connector(features(), mask, instruction()), connector(features()))


# merges


def test_blocks_are_neighbours_in_reading_order() -> None:
    blocks = merge_blocks(torch.arange(16).view(1, 16, 1), 2).squeeze(-1)
    assert blocks.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    blocks = merge_blocks(torch.arange(36).view(1, 36, 1), 3).squeeze(-1)
    assert blocks[0, 1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]


def test_shuffle_and_average_by_hand() -> None:
    given = features(1)
    grid = given.view(4, 4, IN)
    first = torch.stack([grid[0, 2], grid[0, 3], grid[1, 2], grid[1, 3]])
    shuffled = build("shuffle2x2+linear")
    torch.testing.assert_close(shuffled(given)[0, 1], shuffled.inner(first.view(1, 1, -1))[0, 0])
    averaged = build("average2x2+linear")
    torch.testing.assert_close(averaged(given)[0, 1], averaged.inner(first.mean(0)))
    assert shuffled.sizes.in_dim == IN and shuffled.inner.sizes.in_dim == 4 * IN


@pytest.mark.parametrize(
    ("name", "patches", "complaint"),
    [
        ("shuffle2x2+linear", 17, "17 features are no square grid: .* vision_select: patch"),
        ("average2x2+linear", 25, "a grid of 5 x 5 does not divide .* side divisible by 2"),
        ("shuffle3x2+linear", 36, "only square blocks are allowed, such as shuffle2x2"),
        ("shuffle2x2+liner", 16, "connector 'liner' is unknown; .*Did you mean 'linear'"),
        ("shufle2x2+mlp2x_gelu", 16, "Did you mean 'shuffle2x2.mlp2x_gelu'"),
        ("shuffle2x2", 16, "connector 'shuffle2x2' is unknown"),
    ],
)
def test_merges_that_cannot_be(name: str, patches: int, complaint: str) -> None:
    with pytest.raises(PumiceError, match=complaint):
        build(name, patches)


# the resampler


def test_resampler_is_attention_by_torch() -> None:
    connector = build("resampler", depth=2)
    given, width = features(), 16
    mask = torch.rand(3, P, generator=torch.Generator().manual_seed(2)) < 0.5
    states = connector.queries.expand(3, -1, -1)
    entered = connector.enter(given)
    for block in connector.blocks:
        theirs = nn.MultiheadAttention(width, 2, batch_first=True)
        parts = (block.query, block.key, block.value)
        theirs.in_proj_weight.data = torch.cat([part.weight for part in parts]).data
        theirs.in_proj_bias.data = torch.cat([part.bias for part in parts]).data
        theirs.out_proj.weight.data = block.out.weight.data
        theirs.out_proj.bias.data = block.out.bias.data
        values = block.feature_norm(entered)
        keys = values + sincos_2d(P, width, values.device)
        asked = block.query_norm(states)
        states = states + theirs(asked, keys, values, key_padding_mask=~mask)[0]
        states = states + block.feed_forward(block.norm(states))
    expected = connector.leave(connector.norm(states))
    torch.testing.assert_close(connector(given, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["sincos", "learnt", "none"])
def test_position_tells_places_apart(position: str) -> None:
    connector = build("resampler", position=position)
    shuffled = features()[:, torch.arange(P).flip(0)]
    same = torch.allclose(connector(features()), connector(shuffled), atol=1e-5)
    assert same == (position == "none")
    assert ("position" in connector.state_dict()) == (position == "learnt")


@pytest.mark.parametrize(("patches", "width"), [(16, 16), (17, 16), (21, 18), (4, 3)])
def test_sincos_says_row_and_column(patches: int, width: int) -> None:
    table = sincos_2d(patches, width, torch.device("cpu"))
    side = int(patches**0.5)
    grid = table[patches - side * side :].view(side, side, width)
    assert table.shape == (patches, width) and not table[: patches - side * side].any()
    half = 2 * (width // 4)
    assert torch.equal(grid[:, 0, :half], grid[:, 1, :half])  # rows
    assert torch.equal(grid[0, :, half:], grid[1, :, half:])  # columns
    if width >= 4:
        assert len(table[patches - side * side :].unique(dim=0)) == side * side


def test_resampler_chooses_its_width_and_heads() -> None:
    meta = torch.device("meta")
    with meta:
        light = build_connector("resampler", 1024, 4096, 576, vocab_size=1)
    assert light.options == {
        "queries": 64,
        "depth": 1,
        "width": 1024,
        "heads": 16,
        "position": "sincos",
    }
    assert build_connector("resampler", 100, 8, 4, vocab_size=1).options["heads"] == 1
    assert build_connector("resampler", 192, 8, 4, vocab_size=1).options["heads"] == 3


# the Q-Former


def their_qformer(options: dict[str, Any]) -> InstructBlipQFormerModel:
    config = InstructBlipQFormerConfig(
        vocab_size=VOCAB,
        hidden_size=options["width"],
        num_hidden_layers=options["depth"],
        num_attention_heads=options["heads"],
        intermediate_size=options["hidden"],
        cross_attention_frequency=options.get("every", 2),
        encoder_hidden_size=IN,
        attn_implementation="eager",
    )
    theirs = InstructBlipQFormerModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Fresh weights of std 0.02 make every answer look alike.
            parameter.normal_(std=0.3)
    return theirs


@pytest.mark.parametrize("every", [1, 2, 3])
def test_qformer_is_transformers(every: int) -> None:
    torch.manual_seed(3)
    connector = build("qformer", every=every, depth=4).eval()
    theirs = their_qformer(connector.options)
    state = theirs.state_dict()
    unread = {name for name in state if name.startswith("encoder.layer.3.")} - {
        name.removeprefix("qformer.") for name in connector.state_dict()
    }
    assert {name.split(".")[3] for name in unread} == {"intermediate", "output"}
    connector.qformer.load_state_dict({k: v for k, v in state.items() if k not in unread})
    ids, words = instruction()
    words[1, 2:] = False
    seen = torch.rand(3, P, generator=torch.Generator().manual_seed(2)) < 0.7
    queries = connector.query_tokens.expand(3, -1, -1)
    with torch.no_grad():
        states = theirs(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(3, 5, dtype=torch.long), words.long()], 1),
            query_embeds=queries,
            encoder_hidden_states=features(),
            encoder_attention_mask=seen.long(),
        ).last_hidden_state[:, :5]
        expected = connector.language_projection(states)
        ours = connector(features(), seen, Instruction(ids, words))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_qformer_reads_the_instruction_but_not_its_padding() -> None:
    connector = build("qformer").eval()
    ids, mask = instruction()
    plain = connector(features(), None, Instruction(ids, mask))
    longer = torch.cat([ids, torch.full((3, 2), 7)], 1), torch.nn.functional.pad(mask, (0, 2))
    torch.testing.assert_close(connector(features(), None, Instruction(*longer)), plain)
    other = connector(features(), None, Instruction((ids + 1) % VOCAB, mask))
    assert not torch.allclose(other, plain, atol=1e-4)


def test_qformer_reads_an_empty_instruction() -> None:
    connector = build("qformer").eval()
    ids, mask = instruction()
    empty = connector(features(), None, Instruction(ids[:, :0], mask[:, :0]))
    padded = connector(features(), None, Instruction(ids, torch.zeros_like(mask)))
    torch.testing.assert_close(empty, padded)


def test_qformer_without_instruction() -> None:
    connector = build("qformer", instruction=False)
    assert not connector.wants_instruction
    assert not [n for n in connector.state_dict() if "word" in n or ".intermediate." in n]
    assert torch.equal(connector(features()), connector(features(), None, instruction()))
    connector(features()).sum().backward()
    assert all(p.grad is not None for p in connector.parameters())


def test_qformer_drops_out_in_training_only() -> None:
    connector = build("qformer", dropout=0.5)
    given = (features(), None, instruction())
    assert not torch.equal(connector(*given), connector(*given))
    connector.eval()
    assert torch.equal(connector(*given), connector(*given))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (None, "reads the instruction, and none was given"),
        (instruction(2), r"instructions of 3 views were given as ids \(2, 4\)"),
        (instruction(3, 6), "has 6 tokens; this qformer reads at most 5 and nothing is cut off"),
    ],
)
def test_qformer_says_what_is_wrong_with_an_instruction(
    given: Instruction | None, complaint: str
) -> None:
    with pytest.raises(PumiceError, match=complaint):
        build("qformer", max_instruction=5)(features(), None, given)


# options and cost


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("linear", {"queries": 3}, "connector 'linear' has no options, and 'queries' was given"),
        ("mlp2x_gelu", {"width": 3}, "connector 'mlp2x_gelu' has no options"),
        ("resampler", {"querys": 3}, r"no option 'querys'; .* Did you mean 'queries'"),
        ("resampler", {"queries": 0}, "queries .* is 0; a whole number of at least 1"),
        ("resampler", {"depth": True}, "depth .* is True; a whole number"),
        ("resampler", {"heads": 3}, "width 16 cannot have 3 heads"),
        ("resampler", {"position": "rope"}, "'rope'; 'sincos' or 'learnt' or 'none' is needed"),
        ("resampler", {"position": []}, r"\[\]; 'sincos' or"),
        ("qformer", {"instruction": 1}, "instruction .* is 1; true or false"),
        ("qformer", {"dropout": 1.0}, "dropout .* is 1.0; a number of at least 0 and less than 1"),
        ("qformer", {"heads": 5}, "width 16 cannot have 5 heads"),
        ("qformer", {"width": "8"}, "width .* is '8'; a whole number"),
        ("shuffle2x2+linear", {"queries": 3}, "connector 'linear' has no options"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PumiceError, match=complaint):
        build(name, **options)


def test_cost_by_hand() -> None:
    linear = connector_cost(build("linear"))
    assert linear == (IN * OUT + OUT, 2 * P * IN * OUT, P)
    merged = connector_cost(build("shuffle2x2+linear"))
    assert merged == (4 * IN * OUT + OUT, 2 * P * IN * OUT, P // 4)
    queries, width = 5, 16
    weights = P * IN * width  # enter
    weights += 2 * queries * width**2 + 2 * P * width**2  # query and out, key and value
    weights += 2 * queries * P * width  # scores and mixing
    weights += 8 * queries * width**2 + queries * width * OUT  # feed-forward, leave
    assert connector_cost(build("resampler")).flops == 2 * weights


def test_cost_grows_with_the_instruction() -> None:
    connector = build("qformer")
    short, long = connector_cost(connector, 4), connector_cost(connector, 8)
    assert short.tokens == long.tokens == 5 and short.flops < long.flops
    assert short.params == sum(p.numel() for p in connector.parameters())


def test_instructblips_qformer_has_its_size() -> None:
    with torch.device("meta"):
        connector = build_connector("qformer", 1408, 4096, 257, vocab_size=30523)
        config = InstructBlipQFormerConfig(vocab_size=30523)
        theirs = sum(p.numel() for p in InstructBlipQFormerModel(config).parameters())
    unread = 768 * 3072 * 2 + 3072 + 768 + 2 * 768  # the last block's text half
    outside = 32 * 768 + 768 * 4096 + 4096
    assert connector_cost(connector).params == theirs - unread + outside
