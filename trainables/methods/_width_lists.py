"""Lists of widths as settings: `8,6,5,4`, from high to low, as text or as numbers."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from trainables.cost import FLOAT_BITS
from trainables.errors import ConfigError

ALLOWED = frozenset({*range(1, 9), FLOAT_BITS})


def parse_widths(given: Any) -> tuple[int, ...]:
    """Widths of a list of numbers, or of its text.

    Raises:
        ConfigError: not a list of widths from high to low, each once.

    >>> parse_widths("8, 6, 4"), parse_widths([8, 4]), parse_widths(4), parse_widths("")
    ((8, 6, 4), (8, 4), (4,), ())
    """
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
    try:
        widths = tuple(int(str(part)) for part in parts if str(part).strip())
    except ValueError as error:
        raise ConfigError("give a list of widths, such as 8,6,5,4") from error
    if not ALLOWED.issuperset(widths):
        raise ConfigError(f"a width is 1..8, or {FLOAT_BITS} for float")
    if list(widths) != sorted(set(widths), reverse=True):
        wanted = ",".join(str(width) for width in sorted(set(widths), reverse=True))
        raise ConfigError(f"give widths from high to low, each once: {wanted}")
    return widths


def _text(given: Any) -> str:
    return ",".join(str(width) for width in parse_widths(given))


Widths = Annotated[str, BeforeValidator(_text)]
"""A list of widths as text: `8,6,5,4`; a list of numbers is taken, too."""
