"""Where a benchmark's official files and images lie below the data directory."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pumice.core.errors import DataError, PumiceError

if TYPE_CHECKING:
    from pumice.eval.benchmark import Benchmark, Item

T = TypeVar("T")
# What a value of another kind than the official one leads to, however deep it stands in a file.
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
IMAGE_FOLDERS = ("val2014", "{name}/images", "images", "", "{name}", "coco/val2014", "train2014")


def find_file(data_dir: Path, name: str, candidates: Iterable[str]) -> Path:
    """The first file that exists: each candidate in `data_dir`, then in `data_dir/name`."""
    looked = _places(data_dir, name, candidates)
    found = next((path for path in looked if path.is_file()), None)
    if found is None:
        where = ", ".join(str(path) for path in looked)
        raise DataError(
            f"{name}: no official file found; looked for {where}. Give the directory that holds "
            f"the benchmark's files with --data, or make them with `pumice world make --out DIR`."
        )
    return found


def find_file_if_any(data_dir: Path, name: str, candidates: Iterable[str]) -> Path | None:
    """As `find_file`, for files that a benchmark can do without: None when there is none."""
    return next((path for path in _places(data_dir, name, candidates) if path.is_file()), None)


def in_folders(folders: Iterable[str], *names: str) -> list[str]:
    """Candidates for files of a release: in its folders first, as their names are anybody's."""
    return [f"{folder}/{name}" for folder in folders for name in names] + list(names)


def _places(data_dir: Path, name: str, candidates: Iterable[str]) -> list[Path]:
    return [data_dir / folder / file for file in candidates for folder in ("", name)]


def check_data_dir(data_dir: Path) -> None:
    """An error when there is no such directory at all; asked before a model is loaded."""
    if data_dir.is_dir():
        return
    state = "is a file" if data_dir.exists() else "does not exist"
    raise DataError(
        f"the data directory {data_dir} {state}; a directory with the benchmark's official files "
        f"is needed. Check --data, or make one with `pumice world make --out DIR`."
    )


def load_items(benchmark: Benchmark, data_dir: Path) -> list[Item]:
    """The benchmark's items, at least one; files of another form are a DataError.

    So is an id that two items have: one answer would count for both.
    """
    items = well_formed(lambda: benchmark.load(data_dir), f"{benchmark.name}: {data_dir}")
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(
            f"{benchmark.name}: {len(twice)} ids in {data_dir} belong to more than one question "
            f"(the first: {twice[0]!r}), so answers cannot be told apart. Take the official file."
        )
    if not items:
        raise DataError(
            f"{benchmark.name}: its official file in {data_dir} holds no question. Take the "
            f"official file, or make one with `pumice world make --out DIR`."
        )
    return items


def well_formed(read: Callable[[], T], where: str) -> T:
    """What `read` gives; a DataError where a file is not built as the code that reads it expects.

    Benchmarks check the keys of rows; what a value is made of shows only when it is used.
    """
    try:
        return read()
    except PumiceError:
        # Already says what is wrong, and may be one of the errors below.
        raise
    except _MALFORMED as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"{where}: a file is not in the official format ({type(error).__name__}: {error}; at "
            f"{Path(place.filename).name}, line {place.lineno}). Take the official file."
        ) from error


def load_all(benchmarks: Sequence[Benchmark], data_dir: Path) -> dict[str, list[Item]]:
    """The items of each benchmark by its name; asked before a model is loaded.

    Where official files cannot be read the error names all such benchmarks, and those that are
    whole: hours must not pass before a lacking file is told.
    """
    loaded: dict[str, list[Item]] = {}
    problems: dict[str, DataError] = {}
    for benchmark in benchmarks:
        try:
            loaded[benchmark.name] = load_items(benchmark, data_dir)
        except DataError as error:
            problems[benchmark.name] = error
    if not problems:
        return loaded
    if len(benchmarks) == 1:
        raise problems[benchmarks[0].name]
    lines = "".join(f"\n  {error}" for error in problems.values())
    raise DataError(
        f"{len(problems)} of {len(benchmarks)} benchmarks cannot be read from {data_dir}:{lines}\n"
        f"Those that can: {','.join(loaded) or 'none'}. Name these with --bench, or add the files."
    )


def require(
    row: object,
    names: Collection[str],
    where: str,
    *,
    texts: Collection[str] = (),
    ids: Collection[str] = (),
) -> None:
    """An error when an official row lacks something that the benchmark reads.

    Of the names `texts` must be strings, and `ids` strings or whole numbers.
    """
    if not isinstance(row, dict):
        given = f"it is a {type(row).__name__}"
    elif absent := [name for name in names if name not in row]:
        given = f"{', '.join(absent)} absent; it has {', '.join(map(str, row)) or 'nothing'}"
    elif odd := [name for name in texts if not isinstance(row[name], str)]:
        given = f"{odd[0]} is {row[odd[0]]!r:.80}, where a text belongs"
    elif odd := [name for name in ids if not is_id(row[name])]:
        given = f"{odd[0]} is {row[odd[0]]!r:.80}, where a text or a whole number belongs"
    else:
        return
    raise DataError(
        f"{where}: this is not the official format: {given}. Needed: {', '.join(names)}. Take the "
        f"benchmark's official file."
    )


def is_id(value: object) -> bool:
    """Whether a JSON value can name something."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def texts_in(values: object, what: str, where: str) -> list[str]:
    """A list of strings from an official file; a DataError where it is something else."""
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    raise DataError(
        f"{where}: this is not the official format: {what} are {values!r:.120}, where a list of "
        f"texts belongs. Take the benchmark's official file."
    )


class ImageFinder:
    """Finds images by file name in the folders where the official archives unpack."""

    def __init__(self, data_dir: Path, name: str) -> None:
        folders = [data_dir / folder.format(name=name) for folder in IMAGE_FOLDERS]
        self._expected = folders[0]
        # Only what is there: without any images (an answers file is scored) nothing is looked for.
        self._folders = [folder for folder in folders if folder.is_dir()]
        self._found: dict[tuple[str, ...], Path] = {}

    def __call__(self, *names: str) -> Path:
        """The first existing file among the names, else the place where it was expected first.

        A missing image is no error here: its item fails alone, later, and is counted as an error.
        """
        # Benchmarks ask several questions about an image.
        if names not in self._found:
            self._found[names] = self._look_for(names)
        return self._found[names]

    def _look_for(self, names: tuple[str, ...]) -> Path:
        for index, folder in enumerate(self._folders):
            for name in names:
                if (folder / name).is_file():
                    # The next image most likely lies in the same folder.
                    self._folders.insert(0, self._folders.pop(index))
                    return folder / name
        return self._expected / names[0]
