"""Reading answers that some model gave earlier, in the formats people have them in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError
from pumice.core.files import parse_json, read_json, read_jsonl
from pumice.eval.benchmark import Answer
from pumice.eval.locate import is_id, well_formed
from pumice.eval.tables import read_sheet, read_table

# What LLaVA, VQA and VizWiz servers, GQA, MMBench and our own files call the two columns. "answer"
# comes last: beside a "prediction" (MMBench's sheets) it is the truth.
ID_NAMES = ("question_id", "questionId", "id", "index", "image")
TEXT_NAMES = ("text", "prediction", "answer")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file, or of a directory of MME's result files.

    JSON and JSONL: rows of LLaVA ({"question_id", "text"}), of predictions.jsonl ({"id", "text"}),
    of the servers' files ({"question_id" | "questionId" | "image", "answer" | "prediction"}); one
    object {id: text}; ScienceQA's _result.json and _output.jsonl. Sheets and tables (.xlsx, .tsv,
    .csv) with "index" and "prediction". MME's .txt: image, question, truth, answer.

    A row whose text is no string is an answer with an error; one without an id is refused, and one
    whose prompt is no string.
    """
    if path.is_dir() or path.suffix == ".txt":
        answers = _mme_answers(path)
    elif path.suffix in (".xlsx", ".tsv", ".csv"):
        answers = _table_answers(path)
    else:
        answers = well_formed(lambda: _json_answers(path), str(path))
    if not answers:
        raise DataError(f"{path}: no answers in this file; give one row per answered question.")
    return answers


def _json_answers(path: Path) -> list[Answer]:
    document = _document(path)
    if document is None:
        return [
            _answer(row, f"{path}, row {number}")
            for number, row in read_jsonl(path, allow_cut_tail=True)
        ]
    if isinstance(document, list):
        return [_answer(row, f"{path}, row {number}") for number, row in enumerate(document, 1)]
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: answers are rows, a list of them, or an object {{id: text}}; this file holds "
            f"a single {type(document).__name__}. Give an answers file."
        )
    if "outputs" in document:
        document = document["outputs"]
    elif {"correct", "incorrect"} <= document.keys():
        rows = [*document["correct"], *document["incorrect"]]
        return [
            _answer(
                {**row, "text": row["pred"], "prompt": row["question"]}, f"{path}, row {number}"
            )
            for number, row in enumerate(rows, start=1)
            # How ScienceQA's scorer writes down a question that was never answered.
            if (row["pred"], row["question"]) != ("FAILED", "Unknown")
        ]
    return [_text_answer(str(name), text) for name, text in document.items()]


def _document(path: Path) -> Any:
    """The list or object that fills the whole file; None for a file of one row a line."""
    if not path.is_file():
        return read_json(path)
    with path.open("rb") as file:
        first = file.readline().lstrip(b"\xef\xbb\xbf").strip()
        while not first and (line := file.readline()):
            first = line.strip()
        alone = not any(line.strip() for line in file)
    if not first:
        return None
    if alone and not first.startswith(b"{"):
        return read_json(path)
    try:
        row = parse_json(first, file=path, line=1)
    except DataError:
        # A document over several lines, or a JSONL file whose first row is broken; a JSONL row
        # would name an id at once.
        is_row = any(f'"{name}"'.encode() in first for name in ID_NAMES)
        return None if is_row else read_json(path)
    # What follows a whole value is further rows, whatever they call their ids.
    return read_json(path) if alone and not any(name in row for name in ID_NAMES) else None


def _answer(row: object, where: str) -> Answer:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: an answer must be a JSON object, given {type(row).__name__}. Correct this "
            f"row, or make the file again."
        )
    name = _name(next((row[key] for key in ID_NAMES if row.get(key) is not None), None))
    if name is None or not any(key in row for key in (*TEXT_NAMES, "error")):
        raise DataError(
            f"{where}: an answer needs an id ({' or '.join(ID_NAMES)}) and a text "
            f"({' or '.join(TEXT_NAMES)}); this row has {', '.join(row) or 'nothing'}. Correct "
            f"this row."
        )
    for key in ("prompt", "prompt_hash"):
        if not isinstance(row.get(key) or "", str):
            raise DataError(
                f"{where}: {key} is {row[key]!r:.80}, where a text belongs. Correct this row."
            )
    error, category = row.get("error"), row.get("category")
    question = row.get("question") if isinstance(row.get("question"), str) else None
    extra = row["extra"] if isinstance(row.get("extra"), dict) else {}
    # With MMBench's --all-rounds the same index is asked again with turned options.
    turn = row.get("round_id")
    return _text_answer(
        f"{name}#{turn}" if turn else name,
        next((row[key] for key in TEXT_NAMES if key in row), None),
        # Some write down the question alone.
        prompt=row.get("prompt") or question or None,
        category=category if isinstance(category, str) else None,
        # What other tools write where all went well.
        error=None if error in ("", False) else error,
        prompt_hash=row.get("prompt_hash") or None,
        question_hash=extra.get("question_hash"),
        control=extra.get("control"),
    )


def _name(value: object) -> str | None:
    """An id as a text; None where it is none."""
    # A table with a gap in it makes whole numbers such ones.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if is_id(value) else None


def _text_answer(name: str, text: object, *, error: object = None, **more: str | None) -> Answer:
    if error is None and not isinstance(text, str):
        error = f"the row has no text (it is {text!r})"
    return Answer(
        id=name,
        text=text if isinstance(text, str) else "",
        error=None if error is None else str(error),
        **more,
    )


def _table_answers(path: Path) -> list[Answer]:
    rows = read_sheet(path) if path.suffix == ".xlsx" else read_table(path)
    answers = []
    for number, row in enumerate(rows, start=2):
        name, text = row.get("index"), row.get("prediction")
        if name is None or "prediction" not in row:
            raise DataError(
                f"{path}, row {number}: a table of answers needs the columns index and "
                f"prediction; it has {', '.join(row)}. Give the file in MMBench's format."
            )
        # An empty cell is no answer: the item counts as missing.
        if text is not None:
            answers.append(Answer(id=name, text=text, prompt=row.get("question")))
    return answers


def _mme_answers(path: Path) -> list[Answer]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    return [answer for file in files for answer in _mme_file(file)]


def _mme_file(path: Path) -> Iterable[Answer]:
    for number, line in enumerate(read_lines(path), start=1):
        cells = line.split("\t")
        if len(cells) != 4:
            raise DataError(
                f"{path}, line {number}: an MME result has 4 cells with tabs between (image, "
                f"question, truth, answer), this line has {len(cells)}. A tab or a line break "
                f"inside an answer splits it; correct the line, or give the JSONL file."
            )
        image, question, _, text = cells
        yield Answer(f"{path.stem}/{image}", text, prompt=question, category=path.stem)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without their ends."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 text. Save the file again as UTF-8."
        ) from error
    return [line for line in text.split("\n") if line.strip()]
