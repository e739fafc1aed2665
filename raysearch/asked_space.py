"""What a sweep says about its space, and how that is written down.

A sweep names its space (`per_layer`, `mylab.spaces`, `wide.py`), or holds it: a function `space(layers)`, or Optuna
distributions by address. Whatever it was, `sweep.json` keeps the distributions, so a resumed sweep needs no code.
"""

from collections.abc import Callable, Mapping
from typing import Any

from raysearch.errors import SweepError
from trainables import plugins

Asked = str | Mapping[str, Any] | Callable[..., Mapping[str, Any]]
"""What a sweep says about its space."""


def words(space: Asked) -> str:
    """A space in a word, for people.

    >>> words("per_layer"), words("/home/me/wide.py"), words({})
    ('per_layer', 'wide', 'of its own')
    """
    return plugins.label(space) if isinstance(space, str) else getattr(space, "__name__", "of its own")


def written(space: Asked) -> Any:
    """The JSON form: a name as it is, each distribution as Optuna writes it.

    Raises:
        SweepError: a function, whose distributions only `raysearch.resolve.resolve` tells.
    """
    from optuna.distributions import distribution_to_json

    if isinstance(space, str):
        return space
    if callable(space):
        raise SweepError(f"space {words(space)!r} is a function: only a resolved sweep can be written as JSON")
    return {address: distribution_to_json(distribution) for address, distribution in space.items()}


def read(tree: Any) -> Any:
    """The inverse of `written`; what is not in its form is left for `raysearch.resolve.resolve` to refuse.

    Raises:
        SweepError: an entry that is no distribution.
    """
    from optuna.distributions import json_to_distribution

    if not isinstance(tree, Mapping):
        return tree
    found = {}
    for address, text in tree.items():
        try:
            found[address] = json_to_distribution(text) if isinstance(text, str) else text
        except (ValueError, KeyError, TypeError) as error:
            raise SweepError(f"space: {address} = {text!r} is no Optuna distribution: {error}") from error
    return found
