"""How sure a number is: an accuracy measured on so many images, a mean over so many seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Interval(NamedTuple):
    """From `low` to `high`, with a confidence of 95 %."""

    low: float
    high: float


def of_share(share: float, count: int) -> Interval:
    """The Wilson score interval of a share of successes (Wilson 1927), such as an accuracy.

    It speaks of images alone: which other accuracy another test set of this size could have given. Another seed of the
    training moves it further.

    Args:
        share: 0..1.
        count: images that it was measured on, >= 1.

    >>> low, high = of_share(0.99, 10_000)
    >>> round(low, 4), round(high, 4)
    (0.9879, 0.9918)
    """
    from scipy.stats import binomtest

    found = binomtest(round(share * count), count).proportion_ci(LEVEL, method="wilson")
    return Interval(float(found.low), float(found.high))


def of_mean(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of independent values, such as one for each seed; None for fewer than two.

    >>> low, high = of_mean([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    reach = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean - reach, mean + reach)


def in_words(share: float, count: int | None) -> str:
    """An accuracy with its interval; alone where it is not known how many images there were.

    >>> in_words(0.975, 400), in_words(0.975, None)
    ('97.50% (95 %: 95.46..98.64)', '97.50%')
    """
    if count is None:
        return f"{share:.2%}"
    low, high = of_share(share, count)
    return f"{share:.2%} (95 %: {100 * low:.2f}..{100 * high:.2f})"
