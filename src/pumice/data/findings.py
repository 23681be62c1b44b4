"""What `verify` can find in training data: the kinds, and what is kept of each find."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pumice.core.registry import Registry

Severity = Literal["error", "note"]


class Kind(NamedTuple):
    """An error makes a row unfit for training; a note is for the reader to judge."""

    severity: Severity
    about: str


KINDS: Registry[Kind] = Registry(
    "kind of finding",
    {
        "row": Kind("error", "the row cannot be read as a conversation"),
        "slots": Kind("error", "places of images in the text do not match the images"),
        "turns": Kind("error", "turns do not alternate, or one is empty"),
        "box": Kind("error", "a box reaches out of 0..1 or is turned inside out"),
        "tokens": Kind("error", "the conversation is longer than the context"),
        "image_missing": Kind("error", "an image does not exist"),
        "image_unreadable": Kind("error", "an image cannot be decoded whole"),
        "image_size": Kind("error", "an image has too many or too few pixels"),
        "duplicate_row": Kind("error", "the conversation stands in an earlier row"),
        "leak": Kind("error", "an image is one of the evaluation images"),
        "duplicate_id": Kind("note", "the id stands in an earlier row"),
        "duplicate_image": Kind("note", "another file holds the same picture"),
        "image_turned": Kind("note", "an image is turned by its EXIF orientation"),
        "image_mode": Kind("note", "an image is transparent, CMYK or of more than 8 bits"),
    },
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One find: row 0..len-1, how errors name it, its id, what was found and why."""

    row: int
    place: str
    id: str
    kind: str
    reason: str
    image: str = ""

    @property
    def severity(self) -> Severity:
        """That of its kind."""
        return KINDS[self.kind].severity

    def to_dict(self) -> dict[str, Any]:
        """As a line of the manifest."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"row": values.pop("row"), "severity": self.severity, **values}


@dataclass(slots=True)
class Report:
    """All finds of a source, by row; `unread` names evaluation images that cannot be opened."""

    file: str
    fingerprint: str
    rows: int
    images: int
    findings: list[Finding]
    seconds: float
    checked: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def bad_rows(self) -> set[int]:
        """The rows with an error."""
        return {finding.row for finding in self.findings if finding.severity == "error"}

    def counts(self) -> dict[str, int]:
        """Rows with a find of each kind, in the order of the table."""
        rows = {(finding.kind, finding.row) for finding in self.findings}
        found = Counter(kind for kind, _ in rows)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def summary(self) -> dict[str, Any]:
        """What a run keeps of it."""
        return {
            "file": self.file,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "images": self.images,
            "rows_with_errors": len(self.bad_rows),
            "counts": self.counts(),
            "checked": self.checked,
            "unread_evaluation_images": self.unread,
            "seconds": round(self.seconds, 2),
        }
