"""The configuration of one trial: a nested frozen dataclass, a JSON tree, and addresses into it.

The tree is what is written to disk and sent to workers; `parse` turns it into a `TrialConfig` and names everything that
is wrong with it at once. An address is a path in the tree: `optimizer/lr`, `method/per_channel`, `model/width`,
`bits/conv1/weight`. A layer may be a shell pattern: `bits/*/weight`, `bits/layer1.*/weight` (see `layer_bits`). There
is no decoder: a search space's parameter names are addresses.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model, with_config

from trainables import plugins
from trainables.cost import LayerBits
from trainables.errors import ConfigError
from trainables.plugin_settings import PLUGINS, fields_of, owner_of

Tree = dict[str, Any]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How the weights are trained."""

    name: Annotated[Literal["sgd", "adam", "adamw"], Field(description="optimizer")] = "sgd"
    lr: Annotated[float, Field(gt=0, le=100, description="peak learning rate")] = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of sgd, beta1 of adam")] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1, description="weight decay")] = 1e-4
    nesterov: Annotated[bool, Field(description="Nesterov's momentum, of sgd")] = False
    schedule: Annotated[
        Literal["cosine", "linear", "steps", "constant"], Field(description="how the learning rate decays")
    ] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps with rising learning rate")] = 0.0
    hold: Annotated[float, Field(ge=0, lt=1, description="share of the steps before cosine or linear decay")] = 0.0
    milestones: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(description="shares of the steps after which the schedule 'steps' takes a tenth"),
    ] = (0.5, 0.75)
    finetune_factor: Annotated[float, Field(gt=0, le=1, description="times all rates once widths are fixed")] = 0.1


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and on what."""

    epochs: Annotated[int, Field(ge=1, le=100_000, description="epochs of a trial")] = 3
    finetune_epochs: Annotated[
        int, Field(ge=0, le=100_000, description="how many of them, the last ones, keep the learned widths fixed")
    ] = 0
    batch_size: Annotated[int, Field(ge=1, le=1_000_000, description="examples of a step, over all workers")] = 64
    accumulate: Annotated[
        int, Field(ge=1, le=65_536, description="parts in which a worker takes its share of a batch, to save memory")
    ] = 1
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="of matrix products; quantizers and weights stay float32")
    ] = "float32"
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="label smoothing")] = 0.0
    compile: Annotated[Literal["off", "quantizers", "model"], Field(description="what torch.compile compiles")] = "off"


@with_config(_STRICT)
@dataclass(frozen=True, kw_only=True)
class Start:
    """The float network that every trial starts from: trained once, or a file, or nothing (epochs = 0).

    A search over architectures gives all of its trials the base network as `parent`; see `trainables.inherit`.
    """

    epochs: Annotated[int, Field(ge=0, le=100_000, description="epochs of the float start; 0: from scratch")] = 10
    lr: Annotated[float, Field(gt=0, le=100, description="learning rate of the float start")] = 0.05
    batch_size: Annotated[int, Field(ge=1, le=1_000_000, description="examples of a step of the float start")] = 64
    checkpoint: Annotated[str | None, Field(description="safetensors or npz file to start from instead")] = None
    parent: Annotated[
        Literal["own"] | dict[str, str | int | float | bool | None],
        Field(description="`own`, or settings of the model and the data whose float network's weights are inherited"),
    ] = "own"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A method, a model or a data set: its name and its settings, complete with defaults."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that decides what a trial computes.

    Attributes:
        bits: widths by layer name or pattern, as given; `resolve_bits` makes them complete.
        seed: of weights, order of examples and augmentation, 0..2^31-1.
    """

    method: Plugin
    model: Plugin
    data: Plugin
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    start: Start = Start()
    bits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seed: int = 0

    @property
    def search_epochs(self) -> int:
        """Epochs before the widths are fixed; all of them for methods that do not learn widths."""
        return self.training.epochs - self.training.finetune_epochs

    def tree(self) -> Tree:
        """The JSON form; `parse(config.tree()) == config`."""
        tree: Tree = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Plugin):
                tree[part.name] = {"name": value.name, **value.settings}
            elif is_dataclass(value) and not isinstance(value, type):
                tree[part.name] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}
            elif isinstance(value, Mapping):
                tree[part.name] = {name: dict(widths) for name, widths in value.items()}
            else:
                tree[part.name] = value
        return tree


SECTIONS: dict[str, type] = {"optimizer": Optimizer, "training": Training, "start": Start}


def merged(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """A copy of `tree` with values put at their addresses.

    >>> merged({"seed": 0}, {"optimizer/lr": 0.1, "bits/fc/weight": 2})
    {'seed': 0, 'optimizer': {'lr': 0.1}, 'bits': {'fc': {'weight': 2}}}
    """
    copy: Tree = json.loads(json.dumps(tree))
    for address, value in values.items():
        *path, last = address.split("/")
        if path and path[0] in PLUGINS and isinstance(copy.get(path[0]), str):
            copy[path[0]] = {"name": copy[path[0]]}
        node = copy
        for step in path:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{address}: {step!r} is a value, not a group of settings")
        node[last] = value
    return copy


def parse(tree: Mapping[str, Any]) -> TrialConfig:
    """Validate the JSON form of a configuration.

    Raises:
        ConfigError: names all faults at once; unknown addresses with their nearest neighbour.
        PluginError: an unknown method, model or data set.
    """
    faults: list[str] = []
    known = {part.name for part in fields(TrialConfig)}
    for name in tree:
        if name not in known:
            faults.append(f"unknown address {name!r}{plugins.nearest(name, sorted(known))}")
    parts: dict[str, Any] = {}
    for name, kind in PLUGINS.items():
        given = tree.get(name) or {}
        given = {"name": given} if isinstance(given, str) else given
        if not isinstance(given, Mapping) or not isinstance(given.get("name", ""), str):
            faults.append(f"{name} = {given!r}: a name or a group of settings with one is needed")
            continue
        if "name" not in given:
            faults.append(f"{name}/name is missing: one of {', '.join(plugins.describe(plugins.KINDS[kind]))}")
            continue
        settings = {key: value for key, value in given.items() if key != "name"}
        parts[name] = Plugin(name=given["name"], settings=_settings(name, given["name"], settings, faults))
    for name, section in SECTIONS.items():
        parts[name] = _validated(_adapter(section), tree.get(name) or {}, name, _names(section), faults)
    parts["bits"] = _bits(tree.get("bits") or {}, faults)
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        faults.append(f"seed = {seed!r}: an integer from 0 to 2^31 - 1")
    if faults:
        raise ConfigError("; ".join(faults))
    return TrialConfig(**parts, seed=seed)


@cache
def _adapter(owner: Any) -> TypeAdapter[Any]:
    """Validates settings; made once, because a search parses thousands of configurations."""
    if owner in SECTIONS.values():
        return TypeAdapter(owner)
    definitions: dict[str, Any] = {
        key: (annotation, ... if default is inspect.Parameter.empty else default)
        for key, (annotation, default) in fields_of(owner).items()
    }
    return TypeAdapter(create_model("settings", __config__=_STRICT, **definitions))


def _settings(part: str, name: str, given: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    owner = owner_of(part, name)
    value = _validated(_adapter(owner), given, part, list(fields_of(owner)), faults)
    return {} if value is None else value.model_dump(mode="json")


def _names(section: type) -> list[str]:
    return [f.name for f in fields(section)]


def _validated(adapter: TypeAdapter[Any], value: Any, where: str, known: list[str], faults: list[str]) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        for fault in error.errors():
            address = "/".join([where, *map(str, fault["loc"])])
            if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                name = str(fault["loc"][-1])
                hint = plugins.nearest(name, known) or f"; {where} takes {', '.join(known) or 'no settings'}"
                faults.append(f"unknown address {address!r}{hint}")
            elif fault["type"] == "missing":
                faults.append(f"{address} is missing: it has no default")
            else:
                text = fault["msg"].removeprefix("Value error, ")
                faults.append(f"{address} = {fault['input']!r}: {text[:1].lower()}{text[1:]}")
        return None


def _bits(tree: Any, faults: list[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    if not isinstance(tree, Mapping):
        faults.append(f"bits = {tree!r}: give bits/LAYER/weight and bits/LAYER/activation")
        return found
    for layer, widths in tree.items():
        if not isinstance(widths, Mapping):
            faults.append(f"bits/{layer} = {widths!r}: give bits/{layer}/weight and bits/{layer}/activation")
            continue
        for role, width in widths.items():
            if role not in ("weight", "activation"):
                faults.append(f"unknown address 'bits/{layer}/{role}': a layer has weight and activation bits")
            elif not isinstance(width, int) or isinstance(width, bool):
                faults.append(f"bits/{layer}/{role} = {width!r}: an integer number of bits")
            else:
                found.setdefault(layer, {})[role] = width
    return found


def digest(config: TrialConfig, bits: Mapping[str, LayerBits]) -> str:
    """16 hexadecimal digits that two configurations share when they compute the same: bits complete, order ignored."""
    tree = config.tree()
    tree["bits"] = {name: [width.weight, width.activation] for name, width in bits.items()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
