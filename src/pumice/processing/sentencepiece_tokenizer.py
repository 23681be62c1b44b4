"""The tokenizer of a Hugging Face folder: tokenizer.json as it is, or built from tokenizer.model.

Original Llama and LLaVA folders hold a SentencePiece model alone. Its pieces and scores are turned
into the merges of a fast tokenizer, with nothing but the `tokenizers` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pumice.core.errors import PumiceError
from pumice.core.files import entries_of, read_json
from pumice.processing.sentencepiece_model import SentencePieceModel, read_model

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"
_NAMES = ("unk_token", "bos_token", "eos_token", "pad_token")
_KEPT = ("model_max_length", "padding_side", "clean_up_tokenization_spaces")


def read_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder with tokenizer.json, tokenizer.model or vocab and merges.

    Raises PumiceError for a folder with none, and for models that cannot be built the same.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        # This class takes tokenizer.json as it is; a family's own class may rebuild it.
        made: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(directory)
        return made
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        byte_level: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            directory, local_files_only=True
        )
        return byte_level
    if not (directory / "tokenizer.model").is_file():
        raise PumiceError(
            f"{directory} holds neither tokenizer.json nor tokenizer.model (found: "
            f"{entries_of(directory)}); one of them is needed. Copy it beside the weights, "
            "or save the tokenizer with save_pretrained of transformers."
        )
    return _from_model(directory)


def _from_model(directory: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    path = directory / "tokenizer.model"
    model = read_model(path)
    _check(model, path)
    config = _read(directory / "tokenizer_config.json")
    special = _special(model, config, _read(directory / "special_tokens_map.json"))
    # Before there was this setting, the old way was the only one.
    tokenizer = _build(model, legacy=bool(config.get("legacy", True)))
    _add_tokens(tokenizer, model, special, directory, config)
    _add_bos(tokenizer, special, config)
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        **{key: config[key] for key in _KEPT if config.get(key) is not None},
    )
    made.chat_template = _chat_template(directory, config)
    return made


def _check(model: SentencePieceModel, path: Path) -> None:
    what = ""
    if model.algorithm != "bpe":
        what = f"is of the kind {model.algorithm}; only bpe can be rebuilt exactly"
    elif model.character_map:
        what = "rewrites characters before it cuts (a normalisation table); none can be rebuilt"
    elif model.remove_extra_whitespaces:
        what = "drops repeated spaces; only models that keep them can be rebuilt"
    elif any(piece.kind == "unused" for piece in model.pieces):
        what = "holds unused pieces, which cannot be rebuilt"
    if what:
        raise PumiceError(
            f"the SentencePiece model {path} {what}. Save the tokenizer as tokenizer.json with "
            "save_pretrained of transformers, and put it beside this file."
        )


def _build(model: SentencePieceModel, *, legacy: bool) -> Tokenizer:
    """The tokenizer without its special tokens.

    `legacy` puts a space mark before every text, also one behind a special token; otherwise only
    the start of a sequence gets one, and a space that stands there counts as the mark. Both are
    ways of transformers' own Llama tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(model, vocab),
            unk_token=model.pieces[model.unk_id].text,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    if legacy or not model.add_dummy_prefix:
        front = [normalizers.Prepend(_SPACE)] if model.add_dummy_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*front, spaces])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme="first", split=False
        )
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(model: SentencePieceModel, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece would join them.

    It joins the pair whose result scores highest; of equal results the ids of the halves decide,
    as in the published tokenizer.json files.
    """
    found: list[tuple[float, list[tuple[str, str]]]] = []
    for piece in model.pieces:
        if piece.kind != "normal":
            continue
        text = piece.text
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found.append((piece.score, pairs))
    found.sort(key=lambda entry: -entry[0])
    return [pair for _, pairs in found for pair in pairs]


def _special(
    model: SentencePieceModel, config: dict[str, Any], table: dict[str, Any]
) -> dict[str, str]:
    """The spelling of each special token by its name in transformers."""
    places = {"unk_token": model.unk_id, "bos_token": model.bos_id, "eos_token": model.eos_id}
    special = {name: model.pieces[at].text for name, at in places.items() if at >= 0}
    for name in _NAMES:
        for source in (table, config):
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                special[name] = text
    return special


def _add_tokens(
    tokenizer: Tokenizer,
    model: SentencePieceModel,
    special: dict[str, str],
    directory: Path,
    config: dict[str, Any],
) -> None:
    from tokenizers import AddedToken

    entries: dict[int, AddedToken] = {}
    for index, piece in enumerate(model.pieces):
        if piece.kind in ("unknown", "control", "user"):
            # A user's piece is found in text before anything is cut, and is shown as text.
            entries[index] = AddedToken(piece.text, special=piece.kind != "user", normalized=False)
    for text, index in _read(directory / "added_tokens.json").items():
        entries[index] = AddedToken(text, special=text in special.values(), normalized=False)
    for key, value in (config.get("added_tokens_decoder") or {}).items():
        entries[int(key)] = AddedToken(**value)
    for index, token in sorted(entries.items()):
        tokenizer.add_tokens([token])
        given = tokenizer.token_to_id(token.content)
        if given != index:
            raise PumiceError(
                f"{directory}: the added token {token.content!r} has the id {index} in its file "
                f"but would get {given}: ids must go on from the {len(model.pieces)} pieces of "
                "tokenizer.model without a gap. Mend added_tokens.json or tokenizer_config.json."
            )


def _add_bos(tokenizer: Tokenizer, special: dict[str, str], config: dict[str, Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    bos, eos = special.get("bos_token"), special.get("eos_token")
    front = [bos] if bos and config.get("add_bos_token", True) else []
    back = [eos] if eos and config.get("add_eos_token", False) else []
    tokens = [(token, tokenizer.token_to_id(token)) for token in {*front, *back}]
    if tokens:
        tokenizer.post_processor = TemplateProcessing(
            single=[*front, "$A", *back],
            pair=[*front, "$A", *back, *(f"{t}:1" for t in front), "$B:1", *back],
            special_tokens=tokens,
        )


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = _read(directory / "chat_template.json").get("chat_template")
    value = config.get("chat_template") if value is None else value
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an absent file is an empty one."""
    data = read_json(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise PumiceError(f"{path} holds no JSON object; restore the file of the tokenizer.")
    return data
