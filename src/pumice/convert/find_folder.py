"""Where a checkpoint's other half lies: the folder it names, looked for on this machine only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pumice.core.errors import PumiceError
from pumice.core.log import get_logger
from pumice.core.shipped import shipped

log = get_logger(__name__)


def find_folder(
    directory: Path, name: str | None, given: Path | None, *, part: str, option: str
) -> Path:
    """The Hugging Face folder of a `part` that the checkpoint in `directory` calls `name`.

    `given` is what the user said with `option` and is taken as it is. Otherwise: inside the
    checkpoint, beside it, the name as a path, and the cache of huggingface_hub. Nothing is
    downloaded.
    """
    if given is not None:
        if not (given / "config.json").is_file():
            raise PumiceError(
                f"{given} holds no config.json; --{option} needs the Hugging Face folder of the "
                f"{part}{f' ({name})' if name else ''}."
            )
        return given
    tried = []
    for place in _places(directory, name) if name else ():
        if (place / "config.json").is_file():
            log.info("the %s %s is taken from %s", part, name, place)
            return place
        tried.append(str(place))
    raise PumiceError(
        f"{directory} does not hold its {part}, which it calls {name!r}, and it is not on this "
        f"machine (looked at {', '.join(tried) or 'nothing'}, and in the Hugging Face cache). Give "
        f"its folder with --{option} DIR ({option}= in Python), or fetch it with `hf download "
        f"{name or 'NAME'}`."
    )


def _places(directory: Path, name: str) -> Iterator[Path]:
    last = Path(name).name
    if not Path(name).is_absolute():
        yield directory / name
    yield directory.parent / last
    yield Path(name).expanduser()
    found = shipped(name)
    if found is not None:
        yield found
    cached = _in_cache(name)
    if cached is not None:
        yield cached


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
