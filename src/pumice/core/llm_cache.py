"""Replies on disk: each is kept the moment it arrives, so that it is never paid for again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pumice.core.errors import PumiceError
from pumice.core.files import JsonlWriter, read_jsonl
from pumice.core.llm_types import Reply

_KEPT = (
    "text", "has_text", "finish_reason", "model", "prompt_tokens", "completion_tokens", "cost",
)  # fmt: skip


class ReplyCache:
    """A JSONL file of replies by request key; one process at a time holds it.

    A row is `{"key", "text", ...}`, or `{"lost", "key"}` for a call whose reply never arrived and
    which may have been charged. A row that a crash cut short is left out, and its request is asked
    again. Over all runs that wrote to the file, `spent` adds up both, `lost` the second only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the replies: some versions empty the file that they lock.
        self._lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise PumiceError(
                f"the replies {path} are in use by another process, which would pay for the same "
                f"answers. Wait until it has ended, or give another file."
            ) from error
        path.touch()
        self._rows: dict[str, dict[str, Any]] = {}
        self.spent = self.lost = 0.0
        for number, row in read_jsonl(path, allow_cut_tail=True):
            if "key" not in row or not ({"text", "lost"} & row.keys()):
                raise PumiceError(
                    f"{path}, line {number}: this is no reply of an endpoint (keys: "
                    f"{', '.join(row) or 'none'}). Give another file, or remove this line."
                )
            self._count(row)
        self._writer = JsonlWriter(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, key: str) -> Reply | None:
        """The reply kept under this key, marked as cached."""
        row = self._rows.get(key)
        if row is None:
            return None
        return Reply(key=key, cached=True, **{name: row[name] for name in _KEPT if name in row})

    def add(self, reply: Reply) -> None:
        """Keeps a paid reply."""
        row = {"key": reply.key, **{name: getattr(reply, name) for name in _KEPT}}
        self._writer.write(row)
        self._count(row)

    def add_lost(self, key: str, most: float) -> None:
        """Notes that a call without a reply may have cost up to `most`."""
        row = {"key": key, "lost": most}
        self._writer.write(row)
        self._count(row)

    def completion_tokens(self) -> list[int]:
        """How long the kept replies are, for an estimate of those to come."""
        return [int(row.get("completion_tokens") or 0) for row in self._rows.values()]

    def close(self) -> None:
        """Lets the next process in; closing twice is fine."""
        self._writer.close()
        self._lock.release()

    def _count(self, row: dict[str, Any]) -> None:
        self.spent += float(row.get("cost") or row.get("lost") or 0.0)
        self.lost += float(row.get("lost") or 0.0)
        if "text" in row:
            self._rows[row["key"]] = row
