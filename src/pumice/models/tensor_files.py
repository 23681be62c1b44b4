"""The tensors of weight files by name, read only when asked for: safetensors and PyTorch's .bin.

Files are mapped into memory, so that opening costs nothing and a tensor no one changes is never
copied. A file that is cut short, holds code, or is not what its index says is an error.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from pumice.core.errors import PumiceError
from pumice.core.files import entries_of, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
# In the order in which they are looked for.
NAMES = (INDEX, WEIGHTS, PICKLED_INDEX, PICKLED)
# What torch says of a pickle that wants more than tensors.
_GLOBAL = re.compile(r"GLOBAL:? (\S+)")
# What a pickle that is cut short, or is none, makes torch raise.
_BROKEN = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of one or more files; their order is that of the files.

    Only one file of PyTorch's old kind, which cannot be mapped, is kept in memory at a time.
    """

    def __init__(
        self, paths: Iterable[Path], expected: Mapping[Path, Sequence[str]] | None = None
    ) -> None:
        """`expected` are the names that an index says stand in each file."""
        self._places: dict[str, _File] = {}
        self._unmapped: _PickledFile | None = None
        for path in paths:
            names = None if expected is None else expected[path]
            file = _SafetensorsFile(path) if _is_safetensors(path) else _PickledFile(path)
            held = file.names(names)
            for name in held:
                if name in self._places:
                    raise PumiceError(
                        f"the tensor {name} stands in {self._places[name].path.name} and in "
                        f"{path}; each may be in one file only. Take away the file that does not "
                        f"belong to this model."
                    )
                self._places[name] = file

    @classmethod
    def of_folder(cls, folder: Path | str) -> TensorFiles:
        """The weights of a Hugging Face or pumice folder, in one file or in those of its index."""
        folder = Path(folder)
        found = next((folder / name for name in NAMES if (folder / name).is_file()), None)
        if found is None:
            raise PumiceError(
                f"{folder} has no {WEIGHTS}, nor weights under another name ({', '.join(NAMES)}); "
                f"found: {entries_of(folder)}. Copy the directory again in full."
            )
        if found.name not in (INDEX, PICKLED_INDEX):
            return cls([found])
        placed = _read_index(found)
        missing = [path.name for path in placed if not path.is_file()]
        if missing:
            raise PumiceError(
                f"{found} names files that are not there: {', '.join(missing[:8])}. Copy them "
                f"beside it; all {len(placed)} are needed."
            )
        return cls(placed, placed)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor where the file tells it without being read in full."""
        return self._places[name].shape(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._places[name]
        if isinstance(file, _PickledFile) and file is not self._unmapped:
            if self._unmapped is not None:
                self._unmapped.forget()
            self._unmapped = None if file.mapped else file
        return file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class RenamedTensors(Mapping[str, torch.Tensor]):
    """Some tensors of another mapping under other names: new name -> name there."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, dict(names)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `TensorFiles.shape`."""
        return shape_of(self._tensors, self._names[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class JoinedTensors(Mapping[str, torch.Tensor]):
    """Several mappings as one; of a name that several have, the last one's tensor counts."""

    def __init__(self, *parts: Mapping[str, torch.Tensor]) -> None:
        self._places = {name: part for part in parts for name in part}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `TensorFiles.shape`."""
        return shape_of(self._places[name], name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._places[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class ChangedTensors(Mapping[str, torch.Tensor]):
    """The tensors of another mapping, some of them changed by a function as they are read."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        self._tensors, self._changes = tensors, changes

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        change = self._changes.get(name)
        return tensor if change is None else change(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    """The shape of one of `tensors` if it is known without work; None otherwise."""
    if isinstance(tensors, dict):
        return tuple(tensors[name].shape)
    ask = getattr(tensors, "shape", None)
    return ask(name) if ask is not None else None


class _File(Protocol):
    """A file of tensors."""

    path: Path

    def names(self, expected: Sequence[str] | None) -> Iterable[str]:
        """The tensors it holds, or is said to hold."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of one of them, where that costs nothing."""

    def read(self, name: str) -> torch.Tensor:
        """One of them."""


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise PumiceError(
                f"{path} cannot be read: {error}. A whole safetensors file is needed; copy it "
                f"again."
            ) from error

    def names(self, expected: Sequence[str] | None) -> Iterable[str]:
        held = list(self._file.keys())
        if expected is not None:
            _check_names(self.path, held, expected)
        return held

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class _PickledFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise PumiceError(f"there is no file {path}; copy it beside the others.")
        self.mapped = zipfile.is_zipfile(path)
        self._expected: Sequence[str] | None = None
        self._tensors: dict[str, torch.Tensor] | None = None

    def names(self, expected: Sequence[str] | None) -> Iterable[str]:
        self._expected = expected
        # A file that cannot be mapped is read in full only when a tensor of it is wanted.
        if expected is not None and not self.mapped:
            return expected
        names = list(self._load())
        if not self.mapped:
            self.forget()
        return names

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._load()[name].shape) if self.mapped else None

    def read(self, name: str) -> torch.Tensor:
        return self._load()[name].detach()

    def forget(self) -> None:
        """Frees the memory of a file that is not mapped."""
        if not self.mapped:
            self._tensors = None

    def _load(self) -> dict[str, torch.Tensor]:
        if self._tensors is None:
            self._tensors = _read_pickle(self.path, mapped=self.mapped)
            if self._expected is not None:
                _check_names(self.path, self._tensors, self._expected)
        return self._tensors


def _read_pickle(path: Path, *, mapped: bool) -> dict[str, torch.Tensor]:
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = _GLOBAL.search(str(error))
        # A name of torch's own that is not known was cut short with the file.
        if asked is None or asked[1].startswith(("torch.", "collections.")):
            raise _unreadable(path, error) from error
        raise PumiceError(
            f"{path} holds code: it asks for {asked[1]}, which a file of weights needs not, and "
            f"nothing of it was run. Take the weights from a source you trust, as safetensors."
        ) from error
    except _BROKEN as error:
        raise _unreadable(path, error) from error
    if not isinstance(data, dict) or not all(isinstance(t, torch.Tensor) for t in data.values()):
        kinds = sorted({type(t).__name__ for t in data.values()}) if isinstance(data, dict) else []
        raise PumiceError(
            f"{path} holds {', '.join(kinds) or type(data).__name__}; a table of tensors by name "
            f"is needed. Take the file of weights, not a trainer's state."
        )
    return data


def _unreadable(path: Path, error: Exception) -> PumiceError:
    reason = str(error).split("\n")[0][:160]
    return PumiceError(
        f"{path} cannot be read ({type(error).__name__}{f': {reason}' if reason else ''}). A whole "
        f"PyTorch weight file is needed; copy it again."
    )


def _read_index(path: Path) -> dict[Path, list[str]]:
    data = read_json(path)
    table = data.get("weight_map") if isinstance(data, dict) else None
    whole = isinstance(table, dict) and all(isinstance(file, str) for file in table.values())
    if not whole or not table:
        raise PumiceError(
            f"{path} has no weight_map of tensor names to files; copy the index again."
        )
    placed: dict[Path, list[str]] = {}
    for name, file in table.items():
        if Path(file).name != file:
            raise PumiceError(
                f"{path} puts {name} into {file!r}; files beside the index are allowed only."
            )
        placed.setdefault(path.parent / file, []).append(name)
    return dict(sorted(placed.items()))


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _check_names(path: Path, held: Iterable[str], expected: Iterable[str]) -> None:
    found, wanted = set(held), set(expected)
    complaints = [
        f"{what} {', '.join(sorted(names)[:4])} ({len(names)} in all)"
        for what, names in (("lacks", wanted - found), ("has beyond it", found - wanted))
        if names
    ]
    if complaints:
        raise PumiceError(
            f"{path} is not the file that the index beside it describes: it "
            f"{'; it '.join(complaints)}. Copy the index and its files again, all of one model."
        )
