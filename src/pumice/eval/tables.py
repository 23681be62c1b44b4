"""Tables as MMBench publishes and takes them: tab-separated files and Excel sheets."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from collections.abc import Collection, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pumice.core.errors import DataError, PumiceError
from pumice.core.files import write_atomic

Cells = dict[str, str | None]

# What pandas reads as "not available". The published prompts were built from a pandas table, so an
# option whose text is "None" is no option there.
NOT_AVAILABLE = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
     "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
)  # fmt: skip


def read_table(path: Path, empty: Collection[str] = frozenset({""})) -> Iterator[Cells]:
    """The rows of a .tsv or .csv file by column name; a cell with one of the `empty` is None."""
    # Cells hold whole pictures in base64.
    csv.field_size_limit(sys.maxsize)
    delimiter = "," if path.suffix == ".csv" else "\t"
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = _readable(csv.reader(file, delimiter=delimiter), path)
        names = next(reader, (0, []))[1]
        for line, cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {line}: this row has {len(cells)} cells, the table "
                    f"has {len(names)} columns. Take the official file, or correct the row."
                )
            yield {
                name: None if cell in empty else cell
                for name, cell in zip(names, cells, strict=True)
            }


def _readable(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line number and the cells of every row; a DataError for bytes that are no text."""
    try:
        for cells in reader:
            yield reader.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}, after line {reader.line_num}: this is no table of UTF-8 text ({error}). Save "
            f"it as UTF-8 again."
        ) from error


def read_sheet(path: Path) -> Iterator[Cells]:
    """The rows of the first sheet of an Excel file by column name; an empty cell is None."""
    openpyxl = _openpyxl()
    try:
        sheet = openpyxl.load_workbook(path, read_only=True).worksheets[0]
    except (zipfile.BadZipFile, KeyError) as error:
        # KeyError: an archive, and not of a workbook.
        raise DataError(
            f"{path}: this is no Excel workbook ({error}). Save it as .xlsx again, or give the "
            f"answers as .tsv or .jsonl."
        ) from error
    rows = sheet.iter_rows(values_only=True)
    names = [str(name) for name in next(rows, ())]
    for cells in rows:
        # A row ends at its last cell that is not empty.
        yield {name: _text(cell) for name, cell in zip_longest(names, cells[: len(names)])}


def write_sheet(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """An Excel file with one sheet: the names of the columns, then the rows; texts stay texts.

    Raises DataError for a text with a control character, which such a file cannot hold.
    """
    book = _openpyxl().Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    # All of them before the first is written: a sheet that was begun cannot be left.
    cells = [
        [_cell(sheet, value, f"{path}, row {number}") for value in row]
        for number, row in enumerate(rows, start=2)
    ]
    for row in [list(names), *cells]:
        sheet.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    write_atomic(path, buffer.getvalue())


def _cell(sheet: Any, value: object, where: str) -> Any:
    if not isinstance(value, str):
        return value
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.utils.exceptions import IllegalCharacterError

    try:
        cell = WriteOnlyCell(sheet, value)
    except IllegalCharacterError as error:
        raise DataError(
            f"{where}: the text {value!r:.80} holds a control character, which an Excel file "
            f"cannot. Correct it in the answers."
        ) from error
    # Or an answer such as "=A" would become a formula.
    cell.data_type = "s"
    return cell


def _text(cell: object) -> str | None:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return None if cell is None or cell == "" else str(cell)


def _openpyxl() -> Any:
    try:
        import openpyxl
    except ImportError as error:
        raise PumiceError(
            "Excel files need the library openpyxl, which is not installed. Install it with "
            "`pip install 'pumice[benchmarks]'`, or give a .tsv file."
        ) from error
    return openpyxl
