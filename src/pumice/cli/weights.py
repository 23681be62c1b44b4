"""What names a model: the content of its checkpoint, never the directory it lies in."""

from __future__ import annotations

from pathlib import Path

# How the weights were made does not change what they answer.
_NOT_CONTENT = {"training.json"}


def weights_hash(model: str, quantize: str | None = None, adapter: str = "merge") -> str:
    """A hash over every file of the checkpoint that decides its answers, and how it is held."""
    from pumice.core.files import sha256_bytes, sha256_file
    from pumice.core.shipped import resolve_model

    directory: Path = resolve_model(model)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in _NOT_CONTENT)
    lines = (f"{path.relative_to(directory).as_posix()} {sha256_file(path)}" for path in files)
    name = sha256_bytes("\n".join(lines).encode())[:16]
    held = [quantize] if quantize is not None else []
    held += ["adapter"] if adapter == "keep" else []
    return "-".join([name, *held])
