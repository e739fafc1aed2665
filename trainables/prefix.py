"""Evaluate one network at many mixtures of widths without computing twice what does not change between them.

The network becomes a list of steps (torch.fx): each module, function and method call, a quantized layer as two, what it
makes of its input and the product with its weights. What a step computes is named by a digest of the widths that it
and all steps before it depend on, and kept under that name, least recently used out first. To evaluate a mixture is to
ask for the last step; only what is not kept runs. So two mixtures share whatever comes before the first layer in which
they differ, and a layer that never changes runs once.

Kept are the values that several mixtures may start from, and no others: those read by a step that has widths to choose
from, and terms of sums whose other term changes. Every step runs the network's own modules, so the result is that of a
plain evaluation, bit for bit.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import modules
from trainables.cost import Bits
from trainables.method import Choices
from trainables.modes import in_mode

Name = bytes


class Kept:
    """Tensors by name, at most so many bytes of them; the least recently used go first.

    Args:
        most_bytes: limit of all of them together.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._values: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def get(self, name: Hashable) -> tuple[Tensor, ...] | None:
        """The tensors of this name, if they are still there."""
        found = self._values.get(name)
        if found is not None:
            self._values.move_to_end(name)
        return found

    def put(self, name: Hashable, *values: Tensor) -> None:
        """Keep tensors that are not kept yet."""
        self._values[name] = values
        self.bytes += _bytes(values)
        while self.bytes > self.most_bytes:
            _, dropped = self._values.popitem(last=False)
            self.bytes -= _bytes(dropped)


def _bytes(values: Sequence[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


@dataclass
class _Step:
    """One computation.

    Attributes:
        inputs: numbers of the steps that it reads.
        run: from their values to its own.
        own: what it depends on besides, of a mixture of widths.
        varies: whether that has several values.
        norm: the batch norm that it is, if any.
        keep: whether its value is kept.
    """

    inputs: tuple[int, ...]
    run: Callable[..., Any]
    own: Callable[[Bits], Hashable] = lambda bits: None
    varies: bool = False
    norm: nn.Module | None = None
    keep: bool = False


class _Tracer(fx.Tracer):
    """Quantized layers and batch norms are steps, whatever they are made of."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = (modules.QuantizedConv2d, modules.QuantizedLinear, modules.NormSets, _BatchNorm)
        return isinstance(m, kinds) or super().is_leaf_module(m, module_qualified_name)


@dataclass
class Steps:
    """A network as steps, in order; the last one is its output.

    Attributes:
        layers: names of its quantized layers, in order of execution.
    """

    all: list[_Step] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def names(self, bits: Bits) -> list[Name]:
        """What each step's value is called at the widths that the network is switched to."""
        names: list[Name] = []
        for number, step in enumerate(self.all):
            hashed = blake2b(repr((number, step.own(bits))).encode(), digest_size=16)
            for i in step.inputs:
                hashed.update(names[i])
            names.append(hashed.digest())
        return names


def steps_of(model: nn.Module, choices: Mapping[str, Choices]) -> Steps:
    """The steps of a network; of one whose `forward` torch.fx cannot follow, the whole network is a single step.

    Args:
        model: with quantized layers.
        choices: widths of each of them.
    """
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError):  # control flow by values, or a call with a variable number of arguments
        whole = _Step((0,), model, own=lambda bits: repr(sorted((name, repr(width)) for name, width in bits.items())))
        return Steps([_Step((), lambda: None), whole], list(choices))
    steps = Steps()
    places: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        inputs = tuple(places[each] for each in node.all_input_nodes)
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, modules.QuantizedConv2d | modules.QuantizedLinear):
            _add_layer(steps, str(node.target), module, inputs, choices[str(node.target)])
        else:
            sets = isinstance(module, modules.NormSets)
            steps.all.append(_Step(inputs, _call(model, node, module), _own(module), sets, _norm(module)))
        places[node] = len(steps.all) - 1
    _choose_kept(steps.all)
    return steps


def _choose_kept(steps: list[_Step]) -> None:
    """Keep what is read by a step that varies by itself, or beside a value that varies."""
    moves: list[bool] = []
    for step in steps:
        reads = [moves[i] for i in step.inputs]
        # A batch norm mostly goes by the layer before it, and then is no further choice.
        step.varies = step.varies and not (step.norm is not None and any(reads))
        moves.append(step.varies or any(reads))
        for place, i in enumerate(step.inputs):
            beside = any(moving for other, moving in enumerate(reads) if other != place)
            steps[i].keep |= (step.varies or beside) and bool(steps[i].inputs)


def _add_layer(
    steps: Steps, name: str, layer: modules.QuantizedLayer, inputs: tuple[int, ...], widths: Choices
) -> None:
    """Two steps, if the layer computes as every quantized layer does: the input's codes, and the product."""
    steps.layers.append(name)
    weights: dict[int, Tensor] = {}
    kind = modules.QuantizedConv2d if isinstance(layer, modules.QuantizedConv2d) else modules.QuantizedLinear
    if type(layer).forward is not kind.forward or "forward" in vars(layer):
        varies = len(widths.weight) * len(widths.activation) > 1
        steps.all.append(_Step(inputs, layer, lambda bits: (bits[name].weight, bits[name].activation), varies))
        return
    if layer.input_quantizer is not None:
        varies = len(widths.activation) > 1
        steps.all.append(_Step(inputs, layer.input_quantizer, lambda bits: bits[name].activation, varies))
        inputs = (len(steps.all) - 1,)

    def product(x: Tensor) -> Tensor:
        width = layer.weight_quantizer.bits
        if width not in weights:
            weights[width] = layer.weight_quantizer(layer.weight)
        if isinstance(layer, modules.QuantizedConv2d):
            return layer._conv_forward(x, weights[width], layer.bias)
        return nn.functional.linear(x, weights[width], layer.bias)

    steps.all.append(_Step(inputs, product, lambda bits: bits[name].weight, len(widths.weight) > 1))


def _norm(module: nn.Module | None) -> nn.Module | None:
    return module if isinstance(module, modules.NormSets | _BatchNorm) else None


def _own(module: nn.Module | None) -> Callable[[Bits], Hashable]:
    return (lambda bits: module.used) if isinstance(module, modules.NormSets) else (lambda bits: None)


def _call(model: nn.Module, node: fx.Node, module: nn.Module | None) -> Callable[..., Any]:
    """What a node of the graph computes, from the values of the nodes that it reads."""
    if node.op == "placeholder":
        return lambda: None
    if node.op == "get_attr":
        found = model
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return lambda: found

    def run(*values: Any) -> Any:
        known = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return run


def normalised(norm: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """What a batch norm, of one set or of several, makes of `x` with these statistics in place of its own."""
    if isinstance(norm, modules.NormSets):
        return norm.normalised(x, mean, var)
    assert isinstance(norm, _BatchNorm)
    return nn.functional.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel of (batch, channels, ...), as running statistics are."""
    var, mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1])
    return mean, var


class Prefixes:
    """A network's values on one set of images, shared by all mixtures of widths.

    Args:
        model: in evaluation mode; whoever asks switches it to a mixture first.
        choices: widths of its layers.
        images: batches, (N, C, H, W) each.
        calibration: images whose statistics batch norms take, layer after layer; None leaves them theirs.
        most_bytes: of values that are kept; 0 shares nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Mapping[str, Choices],
        images: Sequence[Tensor],
        calibration: Tensor | None = None,
        *,
        most_bytes: int,
    ) -> None:
        self.steps = steps_of(model, choices)
        self.images = list(images)
        self.calibration = calibration
        self.kept = Kept(most_bytes)

    @torch.no_grad()
    def logits(self, bits: Bits, batch: int) -> Tensor:
        """The output for a batch, at the widths that the network is switched to: `bits`.

        Raises:
            IndexError: no such batch.
        """
        names = self.steps.names(bits)
        fed: dict[int, tuple[Tensor, Tensor]] = {}
        if self.calibration is not None:
            self._value(names, -1, self.calibration, fed)
        return self._value(names, batch, self.images[batch], fed)

    def _value(self, names: Sequence[Name], batch: int, images: Tensor, fed: dict[int, Any]) -> Tensor:
        """The last step's value; runs what is not kept, in order, and lets go of what is not read again.

        Args:
            names: of the steps' values.
            batch: -1 for the calibration images.
            images: of the batch.
            fed: statistics of batch norms by step; filled in by the calibration images, read by the others.
        """
        steps, last = self.steps.all, len(self.steps.all) - 1
        values: dict[int, Any] = {}
        readers: dict[int, int] = {}
        wanted, found = [last], set()
        calibrating = self.calibration is not None and batch < 0
        if calibrating:
            wanted += [i for i, step in enumerate(steps) if step.norm is not None and not self._recall(names, i, fed)]
            if len(wanted) == 1:
                return images  # all statistics are known
        while wanted:
            i = wanted.pop()
            if i in found:
                continue
            found.add(i)
            kept = self.kept.get((names[i], batch)) if steps[i].keep else None
            if kept is not None:
                values[i] = kept[0]
                continue
            for each in steps[i].inputs:
                readers[each] = readers.get(each, 0) + 1
                wanted.append(each)
        for i in sorted(found - set(values)):
            step = steps[i]
            values[i] = images if not step.inputs and i == 0 else self._run(i, names, calibrating, values, fed)
            if step.keep and isinstance(values[i], Tensor):
                self.kept.put((names[i], batch), values[i])
            for each in step.inputs:
                readers[each] -= 1
                if not readers[each] and each != last:
                    values.pop(each, None)
        return values[last]

    def _recall(self, names: Sequence[Name], i: int, fed: dict[int, Any]) -> bool:
        """Take the statistics of a batch norm from those that are kept; whether they were there."""
        known = self.kept.get((names[i], "statistics"))
        if known is not None:
            fed[i] = known
        return known is not None

    def _run(
        self, i: int, names: Sequence[Name], calibrating: bool, values: dict[int, Any], fed: dict[int, Any]
    ) -> Any:
        step = self.steps.all[i]
        given = [values[each] for each in step.inputs]
        if step.norm is None or self.calibration is None:
            return step.run(*given)
        if i not in fed:
            fed[i] = statistics(given[0])
            self.kept.put((names[i], "statistics"), *fed[i])
        return normalised(step.norm, given[0], *fed[i])


@torch.no_grad()
def recalibrate(model: nn.Module, images: Tensor) -> None:
    """Give every batch norm the statistics of these images, layer after layer, at the widths in use; in place.

    Args:
        model: switched; its mode is left as it is.
        images: (N, C, H, W).
    """
    inside = {part for m in model.modules() if isinstance(m, modules.NormSets) for part in _parts(m)}
    norms = [m for m in model.modules() if _norm(m) is not None and m not in inside]

    def feed(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        mean, var = statistics(args[0])
        if isinstance(norm, modules.NormSets):
            norm.take(mean, var)
        else:
            norm.running_mean.copy_(mean)  # type: ignore[operator, union-attr]
            norm.running_var.copy_(var)  # type: ignore[operator, union-attr]

    with in_mode(model, training=False), ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(feed))
        model(images)


def _parts(module: Any) -> set[nn.Module]:
    return set(module.modules()) - {module}
