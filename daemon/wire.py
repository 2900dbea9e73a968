"""How values stand in a payload: JSON on one line, texts of bounded length, floats with a point, times in UTC."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

NOT_MEASURED = -1.0
"""Stands for a number that there is none of, since no value is null."""

_LARGEST = 9e15
"""Floats are held below it: from 1e16 on, their shortest form has an exponent."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def encode(content: dict[str, Any] | str, *, ascii_only: bool = False) -> bytes:
    """One line of JSON; a number that is none raises `ValueError`."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False).encode()


def text(content: str, limit: int, *, keep_end: bool = False) -> str:
    """The longest beginning, or end, that takes at most `limit` bytes in JSON; what is no text becomes `?`."""
    cut = slice(1, None) if keep_end else slice(None, -1)
    content = (content[-limit:] if keep_end else content[:limit]).encode(errors="replace").decode()
    while len(encode(content)) - 2 > limit:
        content = content[cut]
    return content


def number(value: float, digits: int = 6) -> float:
    """Round and bound so that the shortest decimal form has a point and no exponent."""
    value = round(max(-_LARGEST, min(_LARGEST, float(value))), digits)
    # Below 1e-4, repr turns to 1e-05; adding 0 takes the sign from -0.0.
    return (value if abs(value) >= 1e-4 else round(value, 4)) + 0.0  # noqa: PLR2004


def iso(at: datetime) -> str:
    """ISO 8601 in UTC with milliseconds and `Z`."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def epoch_ms(at: datetime) -> int:
    """Milliseconds since 1970 UTC."""
    return (at - _EPOCH) // timedelta(milliseconds=1)
