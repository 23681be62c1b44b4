"""What a mixture file may say: its sources, how much of each, and the counts that must come out.

`mixtures/` holds those of LLaVA-1.5; `pumice data mix` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from pumice.core.errors import DataError, PumiceError
from pumice.core.registry import suggest
from pumice.data.mix import Expected, MixPart
from pumice.data.open_source import missing_files, open_source
from pumice.recipe.load import explain
from pumice.recipe.schema import DataFile, PositiveInt, Section
from pumice.recipe.yaml_text import parse_yaml

_SHIPPED = Path(__file__).parent / "mixtures"
Count = Annotated[int, Field(ge=0)]


class Expect(Section):
    """Counts that must come out; those left out are not checked."""

    rows: Count | None = None
    with_image: Count | None = None
    without_image: Count | None = None
    images: Count | None = None
    """Different images."""
    folders: dict[str, Count] = {}
    """Rows by the directory of their (first) image, below the directory of images."""


class MixSource(DataFile):
    """A source of a mixture: its rows, their share, and how many rows they must be."""

    epochs: PositiveInt = 1
    """So often within one epoch of the mixture."""
    expect: Expect | None = None


class MixtureFile(Section):
    """Several sources that become one file of rows."""

    name: str
    about: str = ""
    source: str = ""
    """Where the counts come from."""
    seed: int = 0
    images: str = "."
    """The directory below which the rows of the new file name their images."""
    sources: dict[str, MixSource] = Field(min_length=1)
    expect: Expect | None = None
    """Of all sources together."""

    def parts(self, root: Path) -> list[MixPart]:
        """The sources, opened; paths are below `root`. All that is missing is one error."""
        self._check_inputs(root)
        return [
            MixPart(
                name=name,
                source=open_source(
                    root / entry.path,
                    root / (self.images if entry.images is None else entry.images),
                    kind=entry.kind,
                    question=entry.question,
                ),
                weight=entry.weight,
                cap=entry.cap,
                epochs=entry.epochs,
                expected=expected(entry.expect),
            )
            for name, entry in self.sources.items()
        ]

    def _check_inputs(self, root: Path) -> None:
        """Before any file is read, which may take minutes."""
        missing = [
            f"{file} (source {name})"
            for name, entry in self.sources.items()
            for file in missing_files(root / entry.path)
        ]
        folders = {self.images: "images of the mixture"}
        for name, entry in self.sources.items():
            if entry.images is not None:
                folders.setdefault(entry.images, f"images of source {name}")
        for folder, whose in folders.items():
            path = root / folder
            if not path.is_dir():
                state = " (a file, no directory)" if path.exists() else ""
                missing.append(f"{path}{state} ({whose})")
        if missing:
            raise DataError(
                f"mixture {self.name} needs what is not there: {', '.join(missing)}. Download or "
                f"convert it, or say with --root which directory the paths are below."
            )


def expected(expect: Expect | None) -> Expected | None:
    """The counts as the room of data knows them."""
    return None if expect is None else Expected(**expect.model_dump())


def mixture_names() -> list[str]:
    """The shipped mixtures by name."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_mixture(name_or_file: str) -> tuple[MixtureFile, Path]:
    """A mixture by shipped name or from a YAML file, and the directory its paths are below.

    A file's paths are below its directory; a shipped one's below the current directory.
    """
    known = mixture_names()
    shipped = name_or_file in known
    path = _SHIPPED / f"{name_or_file}.yaml" if shipped else Path(name_or_file)
    if not path.is_file():
        raise PumiceError(
            f"mixture {name_or_file!r} is no file and no shipped mixture; shipped: "
            f"{', '.join(known)}.{suggest(name_or_file, known)}"
        )
    shown = f"mixtures/{path.name}" if shipped else str(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), shown)
        mixture = MixtureFile.model_validate(tree)
    except ValidationError as error:
        raise PumiceError(explain(error, shown, schema=MixtureFile)) from error
    except UnicodeDecodeError as error:
        raise PumiceError(f"mixture file {shown} is not UTF-8 text. Save it again.") from error
    return mixture, Path() if shipped else path.parent
