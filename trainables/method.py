"""The protocol of a quantization method: hooks that the training loop calls, each with a default.

| hook | does |
|---|---|
| `prepare` | swaps modules, sets initial scales |
| `groups` | parameter groups by role: weights, scales, clip levels, gates |
| `losses` | a generator of losses; the loop calls backward on each, then makes one step |
| `before_step` | changes gradients, once they are averaged over all ranks |
| `after_step`, `after_epoch` | changes the model between steps, between epochs |
| `freeze` | ends the search phase of a method that learns its widths: they are fixed from here |
| `faults` | says what is wrong with a configuration beyond the types of its settings |
| `details` | tells what was learned beside the widths, layer by layer |
| `points` | the operating points to evaluate: one for most methods, one per width for switchable networks |
| `choices`, `mixture` | of a switchable network: the widths of each layer, and the point of any mixture of them |
| `stored`, `restore` | what a switchable network is kept as, and back |

A method is a file in `trainables/methods` with a class `Method` that derives from this one and a frozen dataclass
`Settings`, whose fields are addresses (`method/per_channel`) and command-line help at once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from trainables import modules
from trainables.cost import INPUT_BITS, Bits, Layer, LayerBits, LayerTable, Shares
from trainables.errors import ConfigError

if TYPE_CHECKING:
    from trainables.config import TrialConfig


@dataclass(frozen=True, kw_only=True)
class Point:
    """One operating point of a trained model.

    Attributes:
        label: `final` for methods with one point, else what tells the points apart (`4-bit`).
        bits: widths by layer; a layer without is float.
        activate: switches the model to this point.
        output_share: share of a layer's output channels that pruning has left; a layer without keeps all.
        input_share: share of the channels that a layer reads that pruning has left.
        extra_floats: scales and the like that the point stores (None: the convention of `cost.size_bytes`).
    """

    label: str
    bits: Bits
    activate: Callable[[], None] = lambda: None
    output_share: Shares = field(default_factory=dict)
    input_share: Shares = field(default_factory=dict)
    extra_floats: int | None = None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Widths that a layer of a switchable network was trained at, in bits, from high to low.

    Attributes:
        weight: of its weights.
        activation: of the activations that it reads.
    """

    weight: tuple[int, ...]
    activation: tuple[int, ...]


class Method:
    """Base of all methods; see the module's table of hooks.

    Attributes:
        weight_bits: widths that a person may give a layer's weights.
        activation_bits: widths that a person may give the activations that a layer reads.
        signed_codes: whether codes below zero are needed where a layer reads negative values: 1 bit has none.
        given_bits: which of the two can be given at all; `prepare` gets 32 for the others.
        learns_bits: whether widths come out of training, so that a trial's cost is unknown before it.
        step_each_loss: whether the optimizer steps after each of the `losses`, not once after all of them.
        settings: an instance of `Settings`.
        epochs: of the search phase; `after_epoch` is called once for each.
    """

    weight_bits: ClassVar[range] = range(2, 9)
    activation_bits: ClassVar[range] = range(2, 9)
    signed_codes: ClassVar[bool] = True
    given_bits: ClassVar[frozenset[str]] = frozenset({"weight", "activation"})
    learns_bits: ClassVar[bool] = False
    step_each_loss: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """No settings."""

    def __init__(self, settings: Any, *, label_smoothing: float = 0.0, epochs: int = 1) -> None:
        self.settings = settings
        self.label_smoothing = label_smoothing
        self.epochs = epochs

    @classmethod
    def faults(cls, config: "TrialConfig", table: LayerTable) -> Iterator[str]:
        """What is wrong with a configuration of this method, each fault with its address; by default nothing.

        Called before anything is trained. `config.method.settings` has passed the types of `Settings` already.
        """
        yield from ()

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Make `model` trainable at `bits`, in place. By default every layer gets the two quantizers of the method."""
        for row in table.quantizable:
            width = bits[row.name]
            reads = None if row.first else self.input_quantizer(row, width.activation)
            modules.replace(model, row, self.weight_quantizer(row, width.weight), reads)

    def weight_quantizer(self, row: Layer, bits: int) -> modules.Quantizer:
        """The quantizer of one layer's weights."""
        raise NotImplementedError(f"{type(self).__module__} defines neither prepare nor weight_quantizer")

    def input_quantizer(self, row: Layer, bits: int) -> modules.Quantizer:
        """The quantizer of what one layer reads. The network's input has none: pixels are 8-bit codes already."""
        raise NotImplementedError(f"{type(self).__module__} defines neither prepare nor input_quantizer")

    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Set initial scales from one batch of training images, the same on every rank."""
        modules.calibrate(model, images)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups, with the keys that `optimizers.Optimizers` documents."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Losses of one step, each with a graph of its own."""
        yield functional.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)

    def before_step(self, model: nn.Module) -> None:
        """What precedes each optimizer step, with the gradients of the whole batch; by default nothing."""

    def after_step(self, model: nn.Module) -> None:
        """What follows each optimizer step; by default nothing."""

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """What follows each epoch of the search phase (1, 2, ...); True when the optimizer must be rebuilt."""
        return False

    def freeze(self, model: nn.Module) -> None:
        """End the search phase: from here the widths are fixed. By default there is none.

        A resumed trial calls it on a freshly prepared model, too, and loads the values afterwards.
        """

    def points(self, model: nn.Module) -> list[Point]:
        """Operating points of the model as it stands; by default one, with the widths of its quantizers."""
        scales = [p for name, p in model.named_parameters() if is_quantizer_parameter(name)]
        return [Point(label="final", bits=read_bits(model), extra_floats=self.stored_floats(model, scales))]

    def choices(self, model: nn.Module) -> Mapping[str, Choices]:
        """Widths that each quantized layer can be switched to on its own; empty where training leaves one width."""
        return {}

    def mixture(self, model: nn.Module, bits: Bits) -> Point:
        """The operating point `final` of a switchable network with these widths.

        Raises:
            ConfigError: a width that it was not trained at, layers of another network, or it does not switch.
        """
        raise ConfigError(f"method {type(self).__module__.rpartition('.')[2]!r} trains no network that switches widths")

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        """What a switchable network is kept as: all that any of its mixtures needs, by name."""
        return dict(model.state_dict())

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put what `stored` gave into a network prepared as that one was.

        Raises:
            ConfigError: tensors of another network.
        """
        try:
            model.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ConfigError(f"stored network is another one than was prepared: {error}") from error

    def details(self, model: nn.Module) -> Mapping[str, Mapping[str, Any]]:
        """What there is to say of each layer of a trained model beside its widths: layer -> title -> value."""
        return {}

    def stored_floats(self, model: nn.Module, scales: list[nn.Parameter]) -> int:
        """How many floats the quantizers store in an export: by default their parameters."""
        return sum(p.numel() for p in scales)


def check_mixture(bits: Bits, choices: Mapping[str, Choices]) -> None:
    """Refuse widths that a switchable network was not trained at.

    Raises:
        ConfigError: names the first of them, or layers that are missing or unknown.
    """
    if set(bits) != set(choices):
        strange = sorted(set(bits) ^ set(choices))
        raise ConfigError(f"bits of {strange[:3]} are missing or of no quantized layer: give those of {list(choices)}")
    for name, width in bits.items():
        for role in ("weight", "activation"):
            given, trained = getattr(width, role), getattr(choices[name], role)
            if given not in trained:
                raise ConfigError(
                    f"bits/{name}/{role} = {given}: the network is trained at {', '.join(map(str, trained))}; "
                    "give such a one"
                )


def is_quantizer_parameter(name: str) -> bool:
    """Whether a parameter's name says that it belongs to a quantizer."""
    return "_quantizer." in name


def read_bits(model: nn.Module) -> Mapping[str, LayerBits]:
    """Widths of all quantized layers, read from their quantizers."""
    return {
        name: LayerBits(
            weight=layer.weight_quantizer.bits,
            activation=INPUT_BITS if layer.input_quantizer is None else layer.input_quantizer.bits,
        )
        for name, layer in modules.quantized_layers(model)
    }


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of the quantizers, and all others."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in named if is_quantizer_parameter(n)], [p for n, p in named if not is_quantizer_parameter(n)]
