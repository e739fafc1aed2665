"""The search space of a sweep: from a name, a file, a function or distributions, to distributions checked on the model.

`made` asks whoever makes the space; `check` tries its corners before anything is trained.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raysearch.asked_space import Asked, words
from raysearch.errors import SweepError
from raysearch.search.networks import BITS, changes, configured, layers_of, sets_any
from trainables import plugins
from trainables.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from raysearch.sweep import Sweep
    from trainables.cost import Layer, LayerTable
    from trainables.measures import Measure


def made(asked: Asked, layers: Sequence[Any], config: dict[str, Any]) -> dict[str, "BaseDistribution"]:
    """The distributions of a space on a model.

    Args:
        asked: name, file, function or distributions.
        layers: the model's quantizable layers.
        config: base configuration's JSON tree, for functions that take `config`. Those that take `layers_of` get a
            function from values by address to the layers of that network.

    Raises:
        PluginError: no such space, or one that cannot be made of a model's layers.
        SweepError: what it gives are no distributions by address.
    """
    name = asked if isinstance(asked, str) else words(asked)
    if isinstance(asked, Mapping):
        space: Any = dict(asked)
    else:
        make = plugins.attribute("spaces", asked, "space") if isinstance(asked, str) else asked
        try:
            offered = {"config": config, "layers_of": partial(layers_of, config)}
            wanted = inspect.signature(make).parameters
            space = make(layers, **{name: value for name, value in offered.items() if name in wanted})
        except TypeError as error:
            raise PluginError(f"space {name!r} cannot be made of a model's layers: {error}") from error
    faults = _faults(space)
    if faults:
        raise SweepError(f"space {name!r} must return a dict of Optuna distributions by address: {faults}")
    return dict(space)


def _faults(space: Any) -> str:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(space, Mapping):
        return f"it returns {type(space).__name__}"
    kinds = CategoricalDistribution | FloatDistribution | IntDistribution
    faults = [f"{address!r} has {d!r}" for address, d in space.items() if not isinstance(d, kinds)]
    faults += [f"{address!r} is no address" for address in space if not isinstance(address, str)]
    faults += [
        f"{address} offers {choice!r}, which is neither text, number, true, false nor None"
        for address, d in space.items()
        if isinstance(d, CategoricalDistribution)
        for choice in d.choices
        if not isinstance(choice, str | int | float | None)
    ]
    return "; ".join(faults[:3])


def check(
    sweep: "Sweep",
    base: dict[str, Any],
    table: "LayerTable",
    space: Mapping[str, "BaseDistribution"],
    measures: Sequence["Measure"] = (),
) -> None:
    """The corners of the space must be valid configurations, and the budget must leave something to train.

    Raises:
        SweepError, ConfigError: what is wrong; a misspelt layer or address with the nearest one.
    """
    from raysearch.limits import limits_of
    from raysearch.search.proposals import cheapest, corners
    from raysearch.search.repair import within_reach
    from trainables.build import layer_table
    from trainables.config import parse
    from trainables.layer_bits import resolve_bits

    name = sweep.space if isinstance(sweep.space, str) else words(sweep.space)
    if not space and sweep.trials > 1:
        raise SweepError(
            f"space {name!r} has nothing to search on model {sweep.model!r}: take another space, or --trials 1"
        )
    taken = sorted(set(space) & set(sweep.settings))
    if taken:
        raise SweepError(f"{', '.join(taken)}: set by --set and searched by space {name!r}; leave one out")
    layers: dict[str, Layer] = {}
    for values in corners(space):
        try:
            config = parse(configured(base, values))
            here = layer_table(config)
            resolve_bits(config, here)
        except ConfigError as error:
            raise ConfigError(f"space {name!r}: {error}") from error
        layers |= {layer.name: layer for layer in here.quantizable}
    for address in space if changes(space) else ():
        if address.startswith(BITS) and not sets_any(address, list(layers.values())):
            hint = plugins.nearest(address.split("/")[1], list(layers))
            raise ConfigError(f"space {name!r}: {address}: no network of the space has such a layer{hint}")
    over = within_reach(space, base, limits_of(sweep), measures, cheapest(space), table.macs)
    if over:
        raise SweepError(f"the budget leaves nothing to train: the cheapest configuration of the space has {over}")
