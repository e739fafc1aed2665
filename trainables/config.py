"""The configuration of one trial: a nested frozen dataclass, a JSON tree, and addresses into it.

The tree is what is written to disk and sent to workers; `parse` turns it into a `TrialConfig` and names everything that
is wrong with it at once. An address is a path in the tree: `optimizer/lr`, `method/per_channel`, `model/width`,
`bits/conv1/weight`. A layer may be a shell pattern: `bits/*/weight`, `bits/layer1.*/weight`. A name goes before a
pattern, a longer pattern before a shorter; the first and the last layer keep 8 bits unless named in full. There is
no decoder: a search space's parameter names are addresses.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model, with_config

from trainables import plugins
from trainables.cost import FLOAT_BITS, INPUT_BITS, Layer, LayerBits, LayerTable
from trainables.errors import ConfigError

Tree = dict[str, Any]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
ENDS_BITS = 8
"""Width of the first and the last layer unless told otherwise."""
DEFAULT_BITS = 4
"""Width of the layers between them unless told otherwise."""


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
PLUGINS = {"method": "methods", "model": "models", "data": "data"}
_NOT_SETTINGS = ("download", "classes", "num_classes", "input_shape")
"""Keyword parameters of a factory that whoever calls it fills in."""


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


def settings_of(kind: str, name: str) -> dict[str, tuple[Any, Any, str]]:
    """Type, default and description of each setting of a plug-in: address -> (type, default, text)."""
    return {
        key: (annotation, default, _description(annotation))
        for key, (annotation, default) in _plugin_fields(kind, name).items()
    }


def _description(annotation: Any) -> str:
    for extra in getattr(annotation, "__metadata__", ()):
        if getattr(extra, "description", None):
            return str(extra.description)
    return ""


def _plugin_fields(part: str, name: str) -> dict[str, tuple[Any, Any]]:
    return _fields_of(_owner(part, name))


def _owner(part: str, name: str) -> Any:
    """What defines the settings of a plug-in: a dataclass, or a function with keyword parameters."""
    wanted = {"method": "Method", "model": "build", "data": "splits"}[part]
    found = plugins.attribute(PLUGINS[part], name, wanted)
    return found.Settings if part == "method" else found


@cache
def _fields_of(owner: Any) -> dict[str, tuple[Any, Any]]:
    if is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)  # inherited ones too
        return {f.name: (hints[f.name], _default(f)) for f in fields(owner)}
    hints = inspect.get_annotations(owner, eval_str=True)
    return {
        p.name: (hints.get(p.name, Any), p.default)
        for p in inspect.signature(owner).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_SETTINGS
    }


def _default(setting: Any) -> Any:
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return inspect.Parameter.empty if setting.default is MISSING else setting.default


@cache
def _adapter(owner: Any) -> TypeAdapter[Any]:
    """Validates settings; made once, because a search parses thousands of configurations."""
    if owner in SECTIONS.values():
        return TypeAdapter(owner)
    definitions: dict[str, Any] = {
        key: (annotation, ... if default is inspect.Parameter.empty else default)
        for key, (annotation, default) in _fields_of(owner).items()
    }
    return TypeAdapter(create_model("settings", __config__=_STRICT, **definitions))


def _settings(part: str, name: str, given: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    owner = _owner(part, name)
    value = _validated(_adapter(owner), given, part, list(_fields_of(owner)), faults)
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


def resolve_bits(config: TrialConfig, table: LayerTable) -> dict[str, LayerBits]:
    """Widths of every quantizable layer: as given by name or pattern, else 8 bits at the ends and 4 between them.

    Widths that the method decides itself are 32 here.

    Raises:
        ConfigError: a layer that the model does not have, a width that the method does not take, or settings that do
            not fit together; all faults at once.
    """
    if config.method.name == "float":
        if config.bits:
            raise ConfigError("method 'float' has no bits; take lsq, pact, dorefa, or leave bits out")
        return {}
    method = plugins.attribute("methods", config.method.name, "Method")
    names = [layer.name for layer in table.quantizable]
    faults = [
        f"bits/{name}: model {config.model.name!r} has no such layer{plugins.nearest(name, names)}"
        for name in config.bits
        if not any(fnmatchcase(layer, name) for layer in names)
    ]
    inner = [layer.name for layer in table.quantizable if not (layer.first or layer.last)]
    faults += [
        f"bits/{name}: matches only the first or the last layer, which take bits by their full name"
        for name in config.bits
        if name not in names
        and any(fnmatchcase(n, name) for n in names)
        and not any(fnmatchcase(n, name) for n in inner)
    ]
    bits = {}
    for layer in table.quantizable:
        weight = _width(config.bits, layer, "weight") if "weight" in method.given_bits else FLOAT_BITS
        activation = _width(config.bits, layer, "activation") if "activation" in method.given_bits else FLOAT_BITS
        bits[layer.name] = LayerBits(weight=weight, activation=INPUT_BITS if layer.first else activation)
        faults += _width_faults(config, layer, bits[layer.name], method)
    faults += _role_faults(config, method)
    if config.training.finetune_epochs and not method.learns_bits:
        faults.append(
            f"training/finetune_epochs = {config.training.finetune_epochs}: method {config.method.name!r} learns no "
            "widths that could be fixed; leave it at 0"
        )
    elif config.search_epochs < 1:
        faults.append(
            f"training/finetune_epochs = {config.training.finetune_epochs}: fewer than training/epochs = "
            f"{config.training.epochs} are needed, or no width is learned"
        )
    faults += method.faults(config, table)
    if faults:
        raise ConfigError("; ".join(faults))
    return bits


def _width(bits: Mapping[str, Mapping[str, int]], layer: Layer, role: str) -> int:
    """By name, else by the longest pattern (not at the ends), else the default."""
    named = bits.get(layer.name, {}).get(role)
    if named is not None:
        return named
    if layer.first or layer.last:
        return ENDS_BITS
    patterns = [name for name, widths in bits.items() if role in widths and fnmatchcase(layer.name, name)]
    return bits[max(patterns, key=lambda name: (len(name), name))][role] if patterns else DEFAULT_BITS


def _role_faults(config: TrialConfig, method: Any) -> Iterable[str]:
    for name, widths in config.bits.items():
        for role in widths:
            if role not in method.given_bits:
                how = "learns" if method.learns_bits else "has settings for"
                yield f"bits/{name}/{role}: method {config.method.name!r} {how} its {role} bits; leave it out"


def _width_faults(config: TrialConfig, layer: Layer, width: LayerBits, method: Any) -> Iterable[str]:
    name = config.method.name
    allowed = f"{method.weight_bits.start}..{method.weight_bits.stop - 1}"
    if "weight" in method.given_bits and width.weight not in method.weight_bits:
        yield f"bits/{layer.name}/weight = {width.weight}: method {name!r} takes {allowed}{_one_bit(width.weight)}"
    given = config.bits.get(layer.name, {}).get("activation", INPUT_BITS)
    if layer.first and given != INPUT_BITS:
        yield f"bits/{layer.name}/activation = {given}: the network's input has {INPUT_BITS} bits"
    lowest = max(method.activation_bits.start, 2 if layer.signed and method.signed_codes else 1)
    if layer.first or "activation" not in method.given_bits:
        return
    if not lowest <= width.activation < method.activation_bits.stop:
        allowed = f"{lowest}..{method.activation_bits.stop - 1}"
        why = " where the layer reads negative values" if lowest > method.activation_bits.start else ""
        yield f"bits/{layer.name}/activation = {width.activation}: method {name!r} takes {allowed}{why}"


def _one_bit(width: int) -> str:
    return " (use 'dorefa' or 'n2uq' for 1 bit)" if width == 1 else ""


def digest(config: TrialConfig, bits: Mapping[str, LayerBits]) -> str:
    """16 hexadecimal digits that two configurations share when they compute the same: bits complete, order ignored."""
    tree = config.tree()
    tree["bits"] = {name: [width.weight, width.activation] for name, width in bits.items()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
