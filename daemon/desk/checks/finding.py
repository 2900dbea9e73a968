"""What one look at one thing came to."""

from dataclasses import dataclass
from enum import StrEnum


class Mark(StrEnum):
    """How it is; only `fail` must be mended."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """How a thing is: what was looked at, what was found, and what to do where it is not well."""

    mark: Mark
    subject: str
    found: str
    cure: str = ""


def ok(subject: str, found: str) -> Finding:
    """All is well."""
    return Finding(Mark.ok, subject, found)


def warn(subject: str, found: str, cure: str) -> Finding:
    """It works, and may not go on to."""
    return Finding(Mark.warn, subject, found, cure)


def fail(subject: str, found: object, cure: str = "") -> Finding:
    """It does not work. An error of ours says what was found, and after a semicolon the cure."""
    if not cure:
        found, _, cure = " ".join(str(found).splitlines()).partition("; ")
    return Finding(Mark.fail, subject, str(found), cure)
