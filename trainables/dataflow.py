"""What flows where between the layers of a network, read off a symbolic trace without running it.

The layer table says what each layer costs. Methods that prune channels or give one width to a tensor need to know more:
which layers read the same tensor, whose output channels a layer reads one by one, which batch norm belongs to a layer,
and which tensors meet in a residual sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from trainables.errors import ConfigError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_CHANNEL_BY_CHANNEL = (
    *NORMS,
    *(nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.Hardtanh,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.SiLU,
        nn.GELU,
        nn.Sigmoid,
        nn.Tanh,
    ),
)
"""Modules that keep channels apart, and in order."""
_CHANNEL_BY_CHANNEL_FUNCTIONS = {
    *(torch.flatten, torch.relu, torch.sigmoid, torch.tanh, functional.relu, functional.relu6, functional.dropout),
    *(functional.adaptive_avg_pool2d, functional.avg_pool2d, functional.max_pool2d, functional.hardswish),
    *(functional.silu, functional.gelu, functional.leaky_relu),
    *("flatten", "relu", "sigmoid", "tanh", "contiguous"),
}
_SUMS = {"add", "iadd", "add_"}


@dataclass(kw_only=True)
class Flow:
    """Where one layer stands.

    Attributes:
        reads: the tensors that it reads, one a call; equal numbers are the same tensor.
        producer: the layer whose output channels it reads one by one; None behind a sum or a concatenation.
        depthwise: whether each output channel comes from the input channel of the same number alone.
        norm: name of the batch norm that alone reads its output, else None.
        removable: whether its output reaches nothing but layers that sum over its channels, so that some can go.
    """

    reads: list[int] = field(default_factory=list)
    producer: str | None = None
    depthwise: bool = False
    norm: str | None = None
    removable: bool = False


@dataclass(frozen=True, kw_only=True)
class Dataflow:
    """Where all layers stand.

    Attributes:
        layers: by name.
        sums: numbers of the tensors that meet in sums.
        makers: tensor -> names of the modules that make it, the innermost first, each called once in all.
    """

    layers: dict[str, Flow]
    sums: frozenset[int]
    makers: dict[int, list[str]]

    def readers(self, tensors: Iterable[int]) -> list[str]:
        """Names of the layers that read one of the tensors, one for each call."""
        return [name for tensor in tensors for name, flow in self.layers.items() for t in flow.reads if t == tensor]

    def bundle(self, layer: str) -> tuple[int, ...]:
        """The tensors that a layer reads, and those that are tied to them by a layer that reads both.

        What has one width by its reader has one by its tensor: all of a bundle share a quantizer.
        """
        tensors: set[int] = set()
        more = set(self.layers[layer].reads)
        while more > tensors:
            tensors = more
            more = tensors.union(*(flow.reads for flow in self.layers.values() if tensors & set(flow.reads)))
        return tuple(sorted(tensors))


class _Tracer(fx.Tracer):
    """Takes the layers as wholes, whatever is in them, and notes which module makes which tensor."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = set(layers)
        self.calls: list[tuple[str, Any]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.layers or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        self.calls.append((self.path_of_module(m), result))
        return result


def trace(model: nn.Module, layers: Iterable[str]) -> Dataflow:
    """Where the named layers of `model` stand; the model is left as it is.

    Raises:
        ConfigError: the forward pass branches on its data, so that no symbolic trace exists.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> flow = trace(model, ["0", "4"]).layers
    >>> flow["0"].norm, flow["4"].producer
    ('1', '0')
    """
    modules = {name: model.get_submodule(name) for name in layers}
    tracer = _Tracer(modules.values())
    try:
        graph = tracer.trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ConfigError(
            f"cannot tell what flows where in {type(model).__name__}: {error}; its forward must not branch on the data"
        ) from error
    return _read(graph, modules, model, tracer.calls)


def _read(graph: fx.Graph, modules: dict[str, nn.Module], model: nn.Module, calls: list[tuple[str, Any]]) -> Dataflow:
    parts = dict(model.named_modules())
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    flows = {name: Flow(depthwise=_depthwise(module)) for name, module in modules.items()}
    producers: dict[str, list[str | None]] = {name: [] for name in modules}
    norms: dict[str, list[str | None]] = {name: [] for name in modules}
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op == "call_module" and node.target in modules:
            flows[node.target].reads.append(numbers[_same(node.all_input_nodes[0], parts)])
            producers[node.target].append(_producer(node.all_input_nodes[0], modules, parts))
            norms[node.target].append(_norm(node, parts, targets))
            flows[node.target].removable = targets.count(node.target) == 1 and _reaches_layers(
                node, modules, parts, norms[node.target][0]
            )
    for name, flow in flows.items():
        flow.producer = _only(producers[name])
        flow.norm = _only(norms[name])
    sums = {
        numbers[_same(term, parts)]
        for node in graph.nodes
        if _operation(node) in _SUMS and len(node.all_input_nodes) > 1
        for term in node.all_input_nodes
    }
    makers: dict[int, list[str]] = {}
    names = [name for name, _ in calls]
    for name, result in calls:
        if isinstance(result, fx.Proxy) and names.count(name) == 1:
            makers.setdefault(numbers[_same(result.node, parts)], []).append(name)
    return Dataflow(layers=flows, sums=frozenset(sums), makers=makers)


def _only(found: list[Any]) -> Any:
    """The one answer that all calls of a shared layer agree on, else None."""
    return found[0] if len(set(found)) == 1 else None


def _operation(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)) if node.op in ("call_function", "call_method") else ""


def _same(node: fx.Node, parts: dict[str, nn.Module]) -> fx.Node:
    """The node that makes the tensor: identities are looked through."""
    while node.op == "call_module" and isinstance(parts[str(node.target)], nn.Identity):
        node = node.all_input_nodes[0]
    return node


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


def _producer(node: fx.Node, modules: dict[str, nn.Module], parts: dict[str, nn.Module]) -> str | None:
    """The layer that `node` comes from with its channels kept apart; depthwise convolutions keep them apart, too."""
    while node.all_input_nodes:
        if node.op == "call_module" and node.target in modules:
            if not _depthwise(modules[str(node.target)]):
                return str(node.target)
        elif node.op == "call_module":
            if not isinstance(parts[str(node.target)], _CHANNEL_BY_CHANNEL):
                return None
        elif node.target not in _CHANNEL_BY_CHANNEL_FUNCTIONS:
            return None
        node = node.all_input_nodes[0]
    return None


def _reaches_layers(
    node: fx.Node, modules: dict[str, nn.Module], parts: dict[str, nn.Module], norm: str | None
) -> bool:
    """Whether all that reads a tensor are layers that sum over its channels, at most behind channel-by-channel maps."""
    for user in node.users:
        module = parts[str(user.target)] if user.op == "call_module" else None
        if user.op == "call_module" and str(user.target) in modules:
            passes = getattr(module, "groups", 1) == 1
        else:
            alone = isinstance(module, _CHANNEL_BY_CHANNEL) and not (isinstance(module, NORMS) and user.target != norm)
            known = alone or (module is None and user.target in _CHANNEL_BY_CHANNEL_FUNCTIONS)
            passes = known and _reaches_layers(user, modules, parts, norm)
        if not passes:
            return False
    return bool(node.users)


def _norm(node: fx.Node, parts: dict[str, nn.Module], targets: list[Any]) -> str | None:
    """The batch norm that reads the output of a layer, if nothing else does, and if both are called once."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or targets.count(node.target) > 1:
        return None
    target = str(users[0].target)
    return target if isinstance(parts[target], NORMS) and targets.count(target) == 1 else None
