"""The layer table, measured: run the network once and count what it multiplies, whoever asks for it.

A table read off the modules misses functional calls, and reading shapes off module outputs counts shared layers once.
So the trace intercepts the operators themselves (convolutions, matrix products, fused attention) and books each on a
module. A product inside an `nn.Conv2d` or `nn.Linear`, or a subclass of one's own, belongs to that layer, which methods
can quantize. Any other product belongs to the innermost module that makes it, as a row of kind `matmul`:
`nn.MultiheadAttention`, for one, multiplies by its weights without calling a layer.

MACs are those of one input: outputs x multiplications per output, padding included; element-wise products, biases,
norms and pooling are none. Whether a tensor is signed is seen, not derived, on random images with batch norm at the
statistics of the batch, because fresh running statistics say nothing.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from trainables.cost import Layer, LayerTable
from trainables.errors import ConfigError

BATCH = 5  # a prime: work that does not grow with the batch leaves a remainder
LAYERS = (nn.Conv2d, nn.Linear)

# Matrix products, and the position of their first factor; the second follows it.
_MATRIX_PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm"), 0),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm", "_addmm_activation"), 1),
}
_UNCOUNTED = ("_trilinear", "conv_tbc", "_cudnn_rnn", "miopen_rnn", "torchvision::deform_conv2d")


def trace(model: nn.Module, input_shape: tuple[int, int, int]) -> LayerTable:
    """The layer table of `model`: rows in order of execution, MACs of one input.

    Runs a copy of the model on the model's device, in evaluation mode but for batch norm. The model, its buffers and
    its mode are left as they are, and so are the global random generators.

    Args:
        model: any module that takes one batch of images; a layer that it calls several times is one row.
        input_shape: (channels, height, width) of one input.

    Raises:
        ConfigError: a product that cannot be counted, or that does not grow with the number of inputs.

    >>> table = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), (3, 8, 8))
    >>> [(layer.name, layer.kind, layer.macs, layer.signed) for layer in table.layers]
    [('0', 'conv', 7776, True), ('3', 'linear', 2880, False)]
    """
    replica = copy.deepcopy(model).eval()
    for module in replica.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    like = next(replica.parameters(), torch.empty(0))
    images = torch.randn(BATCH, *input_shape, generator=torch.Generator().manual_seed(0)).to(like)
    tracer = _Tracer(replica, images)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _one_thread(), _attention_operator_by_operator(), tracer:
        replica(images)
    return tracer.table()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So little work is done soonest by one thread, above all on a machine whose cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _attention_operator_by_operator() -> Iterator[None]:
    """Keeps `nn.MultiheadAttention` off its fused inference path, one operator with all products inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class _Row:
    """What the calls of one module added up to so far, all inputs of the batch together."""

    macs: int = 0
    channels: int = 0
    signed: bool = False
    first: bool = False
    weights: set[Tensor] = field(default_factory=set)


class _Tracer(TorchDispatchMode):
    """Books each product that runs while it is active on a module of `model`.

    `calls` is the stack of modules whose `forward` is running, the innermost last.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        super().__init__()
        self.model = model
        self.images = images
        self.names = {module: name for name, module in model.named_modules()}
        self.parameters = {_storage(parameter): parameter for parameter in model.parameters()}
        self.rows: dict[nn.Module, _Row] = {}
        self.calls: list[nn.Module] = []
        self.latest: nn.Module | None = None
        for module in self.names:
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(module)
        if isinstance(module, LAYERS):
            self._read(module, [*args, *kwargs.values()][:1])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.calls.pop()

    def _read(self, module: nn.Module, tensors: list[Tensor]) -> _Row:
        """Notes on the module's row what it reads: the network's input or not, and any negative value."""
        row = self.rows.setdefault(module, _Row())
        row.first |= any(_storage(tensor) == _storage(self.images) for tensor in tensors)
        row.signed |= any(bool((tensor < 0).any()) for tensor in tensors)
        return row

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in _UNCOUNTED:
            raise ConfigError(
                f"module {self.names[self.calls[-1]]!r} runs {name!r}, whose products the trace cannot count; "
                "use convolutions and matrix products in its place"
            )
        if not _multiplies(name):
            with self:  # a composite operator, such as matmul in inference mode, shows its parts
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self._book(*_product(name, args, result))
        return result

    def _book(self, macs: int, channels: int, factors: list[Tensor]) -> None:
        """Adds one product to the layer around it, or else to the innermost module."""
        module = next((call for call in reversed(self.calls) if isinstance(call, LAYERS)), self.calls[-1])
        if isinstance(module, LAYERS):
            row = self.rows[module]
        else:
            weights = [factor for factor in factors if _storage(factor) in self.parameters]
            row = self._read(module, [factor for factor in factors if _storage(factor) not in self.parameters])
            row.weights |= {self.parameters[_storage(weight)] for weight in weights}
        row.macs += macs
        row.channels = channels
        self.latest = module

    def table(self) -> LayerTable:
        """The rows per input, and what the model stores beside them; each parameter is counted once."""
        counted: set[Tensor] = set()
        layers = []
        for module, row in self.rows.items():
            if row.macs:
                weights, biases = _parameters(module, row)
                counted |= weights | biases
                layers.append(self._layer(module, row, weights, biases))
        norms = [module for module in self.names if isinstance(module, _BatchNorm)]
        counted |= {parameter for norm in norms for parameter in norm.parameters()}
        others = set(self.model.parameters()) - counted
        return LayerTable(
            layers=tuple(layers),
            norm_channels=sum(norm.num_features for norm in norms),
            other_parameters=sum(parameter.numel() for parameter in others),
        )

    def _layer(self, module: nn.Module, row: _Row, weights: set[Tensor], biases: set[Tensor]) -> Layer:
        macs, remainder = divmod(row.macs, BATCH)
        if remainder:
            raise ConfigError(
                f"module {self.names[module]!r} makes {row.macs} multiply-accumulates for {BATCH} inputs, which "
                f"{BATCH} does not divide: some do not depend on the input; compute those outside of forward"
            )
        return Layer(
            name=self.names[module],
            kind="conv" if isinstance(module, nn.Conv2d) else "linear" if isinstance(module, nn.Linear) else "matmul",
            macs=macs,
            weights=sum(weight.numel() for weight in weights),
            biases=sum(bias.numel() for bias in biases),
            channels=row.channels,
            signed=row.signed,
            first=row.first,
            last=module is self.latest,
            quantizable=isinstance(module, LAYERS),
        )


def _parameters(module: nn.Module, row: _Row) -> tuple[set[Tensor], set[Tensor]]:
    """Weights and biases of a row. Functional biases are not told from other additions: they count as other."""
    if isinstance(module, LAYERS):
        return {module.weight}, set() if module.bias is None else {module.bias}
    return row.weights, set()


def _storage(tensor: Tensor) -> int:
    """Address of the memory of a tensor, which its views share."""
    return tensor.untyped_storage().data_ptr()


def _multiplies(name: str) -> bool:
    return name in ("convolution", "mkldnn_rnn_layer", *_MATRIX_PRODUCTS) or name.startswith("_scaled_dot_product")


def _product(name: str, args: tuple[Any, ...], result: Any) -> tuple[int, int, list[Tensor]]:
    """Multiply-accumulates of one product, its output channels, and its factors."""
    if name == "convolution":
        image, kernel, transposed = args[0], args[1], args[6]
        # Kernels are (out, in / groups, ...), applied once an output; transposed (in, out / groups, ...), an input.
        return (image if transposed else result).numel() * kernel[0].numel(), result.shape[1], [image, kernel]
    if name == "mkldnn_rnn_layer":
        sequence, weight_input, weight_hidden = args[:3]
        steps = sequence.shape[0] * sequence.shape[1]
        return steps * (weight_input.numel() + weight_hidden.numel()), result[0].shape[-1], list(args[:3])
    if name.startswith("_scaled_dot_product"):
        query, key, value = args[:3]  # (batch, heads, queries, depth), twice (batch, heads, keys, depth)
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        return scores * (query.shape[-1] + value.shape[-1]), value.shape[-1], list(args[:3])
    left, right = args[_MATRIX_PRODUCTS[name] :][:2]
    columns = right.shape[-1] if right.dim() > 1 else 1
    return left.numel() * columns, columns, [left, right]
