"""Numbers, durations and instants as the report says them."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def percent(value: float | None) -> str:
    """0.4321 -> "43.2"; None -> an en dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def signed(value: float | None) -> str:
    """0.012 -> "+1.2", with a true minus; None -> an en dash."""
    if value is None:
        return "–"
    text = f"{100 * abs(value):.1f}"
    if text == "0.0":
        return "±0.0"
    return ("+" if value > 0 else "−") + text


def tone(value: float | None) -> str:
    """CSS class of a difference: up, down or same."""
    if value is None or abs(value) < 0.0005:
        return "same"
    return "up" if value > 0 else "down"


def duration(seconds: float | None) -> str:
    """75.2 -> "1 min 15 s"."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size_of(value: float | None) -> str:
    """1234567 -> "1.2 MB"."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit always returns")


def moment(value: Any) -> str:
    """An ISO instant or seconds since 1970 as "2026-03-01 12:30 UTC"."""
    if isinstance(value, int | float):
        value = datetime.fromtimestamp(value, UTC).isoformat()
    try:
        instant = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value or "–")
    if instant.tzinfo:
        instant = instant.astimezone(UTC)
    return instant.strftime("%Y-%m-%d %H:%M") + (" UTC" if instant.tzinfo else "")


def words(name: str) -> str:
    """An identifier as words: "num_images" -> "num images"."""
    return name.replace("_", " ").strip()


def plain(value: Any) -> str:
    """Any JSON value in one line, for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(name))} {plain(one)}" for name, one in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(plain(one) for one in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_json(value: Any) -> str:
    """Indented JSON where it is a mapping, in one line otherwise."""
    return json.dumps(value, ensure_ascii=False, indent=1 if isinstance(value, Mapping) else None)
