"""Numbers as the report shows them: sizes, durations, speeds, counts."""

import math

MISSING = "\N{EN DASH}"
NOT_RUN = "not run"


def plural(count: int, noun: str) -> str:
    """The noun in the number that its count asks for."""
    return noun if count == 1 else noun + "s"


def size_text(count: float | None) -> str:
    """Decimal units, three digits: 1.19 GB, 266 MB."""
    if count is None:
        return MISSING
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{max(0, 2 - int(math.log10(count / size)))}f} {unit}"
    return f"{count:.0f} B"


def duration_text(seconds: float | None) -> str:
    """12.3 s, 10 min, 2 h 01 min."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate_text(tokens_per_second: float) -> str:
    """Tokens per second, four digits below a thousand: 31.42, 1,234."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.4g}"


def value_text(value) -> str:
    """Any value of a JSON file as short text."""
    if value is None:
        return MISSING
    if isinstance(value, dict) and "score" in value:
        interval = " [{:.2f}, {:.2f}]".format(*value["interval"]) if value.get("interval") else ""
        return f"{value['score']:.2f}{interval}"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
