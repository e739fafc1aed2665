"""SAT and AdaBits against arrays that the authors' own code computed: quantizers, layers, switching."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.trainables.golden_adabits import Settings, arrays_of, assert_close, method_settings, prefixes, settings_of
from trainables import modules
from trainables.methods._norm_sets import SwitchableNorm
from trainables.methods._sat_as_published import evaluation_as_published
from trainables.methods._sat_kernels import unit_levels
from trainables.methods._sat_quantizers import SatClip, SatWeight
from trainables.methods._switchable_clip import SwitchableClip, position
from trainables.methods.sat import CLIP_INIT


def test_the_scalar_quantizer_gives_the_published_levels_and_gradients_exactly():
    stored, axes = arrays_of("quantizer.npz"), settings_of("quantizer.npz", "y")
    for i, scheme in enumerate(axes["schemes"]):
        for j, bits in enumerate(axes["bits"]):
            x = stored["x"].clone().requires_grad_()
            y = unit_levels(x, torch.tensor(2.0**bits - 1), scheme=scheme)
            y.backward(stored["upstream"])
            assert_close(y, stored["y"][i, j], "quantizer.npz")
            assert_close(x.grad, stored["grad_x"][i, j], "quantizer.npz")


def target_of(rescale: str) -> Any:
    return None if rescale == "off" else rescale


def effective(quantizer: SatWeight, w: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
    w = w.clone().requires_grad_()
    y = quantizer(w)
    y.backward(upstream)
    return y, w.grad


@pytest.mark.parametrize("rescale", ["off", "constant", "stddev"])
@pytest.mark.parametrize("layer", prefixes("weight_quant.npz", "w"))
def test_weights_and_their_gradients_are_the_published_ones(layer, rescale):
    file, stored = "weight_quant.npz", arrays_of("weight_quant.npz")
    axes = settings_of(file, f"{layer}.w_eff")
    assert rescale in axes["rescale"]
    outputs, gradients = stored[f"{layer}.w_eff"], stored[f"{layer}.grad_w"]
    i = axes["rescale"].index(rescale)
    for j, scheme in enumerate(axes["schemes"]):
        for k, bits in enumerate(axes["bits"]):
            quantizer = SatWeight(bits, scheme=scheme, target=target_of(rescale))
            y, grad = effective(quantizer, stored[f"{layer}.w"], stored[f"{layer}.upstream"])
            assert_close(y, outputs[i, j, k], file, like=outputs)
            assert_close(grad, gradients[i, j, k], file, like=gradients)


@pytest.mark.parametrize("layer", prefixes("weight_quant.npz", "fp_w_eff"))
def test_float_weights_and_their_gradients_are_the_published_ones(layer):
    file, stored = "weight_quant.npz", arrays_of("weight_quant.npz")
    axes = settings_of(file, f"{layer}.fp_w_eff")
    outputs, gradients = stored[f"{layer}.fp_w_eff"], stored[f"{layer}.fp_grad_w"]
    for i, clamp in enumerate(axes["clamp"]):
        for j, rescale in enumerate(axes["rescale"]):
            quantizer = SatWeight(axes["bits"], scheme="modified", target=target_of(rescale), clamp=clamp)
            y, grad = effective(quantizer, stored[f"{layer}.w"], stored[f"{layer}.upstream"])
            assert_close(y, outputs[i, j], file, like=outputs)
            assert_close(grad, gradients[i, j], file, like=gradients)


def linear(stored: dict[str, Tensor], layer: str, quantizer: SatWeight) -> modules.QuantizedLinear:
    outputs, inputs = stored[f"{layer}.w"].shape
    plain = nn.Linear(inputs, outputs)
    plain.weight.data, plain.bias.data = stored[f"{layer}.w"].clone(), stored[f"{layer}.bias"].clone()
    return modules.QuantizedLinear(plain, quantizer, None)


@pytest.mark.parametrize("layer", prefixes("weight_quant.npz", "eval_w_eff"))
def test_the_published_evaluation_of_a_linear_layer_can_be_had(layer):
    file, stored = "weight_quant.npz", arrays_of("weight_quant.npz")
    axes = settings_of(file, f"{layer}.eval_w_eff")
    weights, biases = stored[f"{layer}.eval_w_eff"], stored[f"{layer}.eval_bias_eff"]
    for i, rescale in enumerate(axes["rescale"]):
        for j, scheme in enumerate(axes["schemes"]):
            for k, bits in enumerate(axes["bits"]):
                quantizer = SatWeight(bits, scheme=scheme, target=target_of(rescale))
                weight, bias = evaluation_as_published(linear(stored, layer, quantizer))
                assert_close(weight, weights[i, j, k], file, like=weights)
                assert_close(bias, biases[i, j, k], file, like=biases)
    axes = settings_of(file, f"{layer}.fp_eval_w_eff")
    weights, biases = stored[f"{layer}.fp_eval_w_eff"], stored[f"{layer}.fp_eval_bias_eff"]
    for i, clamp in enumerate(axes["clamp"]):
        for j, rescale in enumerate(axes["rescale"]):
            quantizer = SatWeight(axes["bits"], scheme="modified", target=target_of(rescale), clamp=clamp)
            weight, bias = evaluation_as_published(linear(stored, layer, quantizer))
            assert_close(weight, weights[i, j], file, like=weights)
            assert_close(bias, biases[i, j], file, like=biases)


def compare_clip(quantizer: SatClip, x: Tensor, upstream: Tensor, wanted: dict[str, Tensor], part: Any) -> None:
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(upstream)
    for found, array in zip((y, x.grad, quantizer.clip_max.grad), wanted.values(), strict=True):
        assert_close(found, array[part], "act_quant.npz", like=array)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", settings_of("act_quant.npz", "y")["schemes"])
def test_activations_and_their_gradients_are_the_published_ones(scheme, signed):
    stored, axes = arrays_of("act_quant.npz"), settings_of("act_quant.npz", "y")
    wanted = {name: stored[name] for name in ("y", "grad_x", "grad_alpha")}
    for i, clip_max in enumerate(axes["alpha"]):
        for j, bits in enumerate(axes["bits"]):
            quantizer = SatClip(bits, signed=signed, scheme=scheme, clip_init=clip_max)
            part = (i, axes["double_side"].index(signed), axes["schemes"].index(scheme), j)
            compare_clip(quantizer, stored["x"], stored["upstream"], wanted, part)


@pytest.mark.parametrize("signed", [False, True])
def test_float_activations_are_clipped_as_published(signed):
    stored, axes = arrays_of("act_quant.npz"), settings_of("act_quant.npz", "fp_y")
    wanted = {name: stored[name] for name in ("fp_y", "fp_grad_x", "fp_grad_alpha")}
    for i, clip_max in enumerate(axes["alpha"]):
        quantizer = SatClip(
            axes["bits"], signed=signed, scheme="original", clip_init=clip_max, clip_float=axes["pact_fp"]
        )
        part = (i, axes["double_side"].index(signed))
        compare_clip(quantizer, stored["x"], stored["upstream"], wanted, part)


def weight_quantizer(kind: str, bits: int, options: Settings) -> SatWeight:
    given = method_settings(options)
    on = given["rescale" if kind == "linear" else "rescale_conv"]
    return SatWeight(
        bits, scheme=given["weight_scheme"], target=given["rescale_target"] if on else None, clamp=given["clamp"]
    )


def plain_layer(kind: str, shape: Settings, arguments: Settings) -> nn.Conv2d | nn.Linear:
    if kind == "linear":
        return nn.Linear(shape["ci"], shape["co"])
    padding = 0 if arguments.get("same_padding") else shape["p"]
    return nn.Conv2d(
        shape["ci"],
        shape["co"],
        shape["k"],
        stride=shape["s"],
        padding=padding,
        groups=shape.get("groups", 1),
        bias=shape.get("bias", False),
    )


def padded_as_tensorflow(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around, the odd one to the right and below, so that a stride divides the sides, rounded up."""
    missing = max(0, (-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1])
    before, after = missing // 2, missing - missing // 2
    return functional.pad(x, (before, after, before, after))


@pytest.mark.parametrize("case", prefixes("layers.npz", "x"))
def test_a_layer_gives_the_published_outputs_and_all_gradients(case, kernels):
    file = "layers.npz"
    stored = {
        name.removeprefix(f"{case}."): value for name, value in arrays_of(file).items() if name.startswith(f"{case}.")
    }
    given = settings_of(file, f"{case}.x")
    kind, options, arguments = given["kind"], given["options"], given["layer_args"]
    both = given["bits"] if isinstance(given["bits"], list) else [given["bits"]] * 2
    weight_bits, activation_bits = (max(b, arguments.get(f"bit{x}_min", 0)) for b, x in zip(both, "wa", strict=True))
    clip = SatClip(
        activation_bits,
        signed=arguments.get("double_side", False),
        scheme=method_settings(options)["activation_scheme"],
        clip_init=given["alpha"],
        clip_float=arguments.get("pact_fp", False),
    )
    unread = arguments.get("weight_only", False) or options.get("weight_only", False)
    plain = plain_layer(kind, given["geometry"], arguments)
    plain.weight.data = stored["w"].clone()
    if "bias" in stored:
        plain.bias.data = stored["bias"].clone()
    wrap = modules.QuantizedLinear if kind == "linear" else modules.QuantizedConv2d
    layer: Any = wrap(plain, weight_quantizer(kind, weight_bits, options), None if unread else clip)  # type: ignore[arg-type]
    x = stored["x"].float().clone().requires_grad_()
    read = x
    if arguments.get("same_padding"):
        read = padded_as_tensorflow(x, given["geometry"]["k"], given["geometry"]["s"])
    clipped: list[Tensor] = []
    clip.register_forward_hook(lambda _, args, output: clipped.append(output))
    y = layer(read)
    for output in clipped:
        output.retain_grad()
    y.backward(stored["upstream"])
    found = {"y": y, "grad_x": x.grad, "grad_w": layer.weight.grad, "grad_alpha": clip.clip_max.grad}
    if layer.bias is not None:
        found["grad_bias"] = layer.bias.grad
    weight, bias = evaluation_as_published(layer)
    with torch.no_grad():
        inputs = read if unread else clip(read)
        found["y_eval"] = (
            functional.linear(inputs, weight, bias) if kind == "linear" else layer._conv_forward(inputs, weight, bias)
        )
    assert set(stored) - {"x", "w", "bias", "upstream"} <= set(found)
    for name in set(stored) & set(found):
        like = summands(clip, read, clipped[0]) if name == "grad_alpha" else None
        assert_close(found[name], stored[name], file, like=like)


def summands(clip: SatClip, x: Tensor, y: Tensor) -> Tensor:
    """The two sums whose difference is the gradient of a clip level, and by which its rounding errors go.

    A difference of sums that nearly cancel has errors above a share of itself: those of the stored one, too, which
    float64 contradicts by more than the tolerance where the sums are 17 times their difference.
    """
    bound = clip.clip_max.detach().abs()
    x, g = x.detach(), y.grad
    inside = (x > (-bound if clip.signed else 0)) & (x < bound)
    assert g is not None
    return torch.stack([(g * y.detach()).sum(), (g * x * inside).sum()]) / bound


@pytest.mark.parametrize("case", prefixes("switching.npz", "running_mean"))
def test_sets_of_batch_norm_give_the_published_outputs_gradients_and_statistics(case):
    file = "switching.npz"
    stored = {n.removeprefix(f"{case}."): v for n, v in arrays_of(file).items() if n.startswith(f"{case}.")}
    given = settings_of(file, f"{case}.weight")
    widths, options = tuple(given["bits_list"]), given["options"]
    plain = nn.BatchNorm2d(stored["x"].shape[2], eps=given["eps"], momentum=given["momentum"])
    norm = SwitchableNorm(plain, len(widths), shared_affine=options.get("stats_sharing", False))
    norm.weight.data, norm.bias.data = stored["weight"].clone(), stored["bias"].clone()

    def use(bits: int) -> None:
        norm.index.fill_(position(bits, widths, as_published=True) if options.get("switchbn", True) else 0)

    steps = settings_of(file, f"{case}.x")["bits_sequence"]
    for i, bits in enumerate(steps):
        use(bits)
        x = stored["x"][i].clone().requires_grad_()
        y = norm(x)
        y.backward(stored["upstream"][i])
        assert_close(y, stored["y"][i], file, like=stored["y"])
        assert_close(x.grad, stored["grad_x"][i], file, like=stored["grad_x"])
    assert_close(norm.running_mean, stored["running_mean"], file)
    assert_close(norm.running_var, stored["running_var"], file)
    assert torch.equal(norm.num_batches_tracked, stored["num_batches"])
    assert_close(norm.weight.grad, stored["grad_weight"], file)
    assert_close(norm.bias.grad, stored["grad_bias"], file)
    norm.eval()
    for i, bits in enumerate(settings_of(file, f"{case}.y_eval")["bits"]):
        use(bits)
        assert_close(norm(stored["x"][0]), stored["y_eval"][i], file, like=stored["y_eval"])


@pytest.mark.parametrize("case", prefixes("switching.npz", "alpha_init"))
def test_switched_clip_levels_give_the_published_outputs_and_gradients(case):
    file = "switching.npz"
    stored = {n.removeprefix(f"{case}."): v for n, v in arrays_of(file).items() if n.startswith(f"{case}.")}
    given = settings_of(file, f"{case}.alpha_init")
    widths, passes = tuple(given["bits_list"]), settings_of(file, f"{case}.y")
    kind = "linear" if stored["w"].dim() == 2 else "conv"
    options: Settings = {"signed": False, "scheme": passes["act_scheme"], "clip_init": CLIP_INIT[kind]}
    switched = given["switch_alpha"]
    clip = SwitchableClip(widths[-1], levels=len(widths), **options) if switched else SatClip(widths[-1], **options)
    assert_close(clip.clip_max, stored["alpha_init"], file)
    clip.clip_max.data = stored["alpha"].clone()
    weights = weight_quantizer(kind, widths[-1], {"weight_quant_scheme": passes["weight_scheme"]})
    for i, bits in enumerate(passes["bits"]):
        weights.set_bits(bits)
        clip.set_bits(bits)
        if isinstance(clip, SwitchableClip):
            clip.index.fill_(position(bits, widths, as_published=True))
        x, w = (stored[name].clone().requires_grad_() for name in ("x", "w"))
        clip.clip_max.grad = None
        if kind == "linear":
            y = functional.linear(clip(x), weights(w), stored["bias"])
        else:
            y = functional.conv2d(clip(x), weights(w), padding=(stored["y"].shape[-1] - x.shape[-1] + 2) // 2)
        y.backward(stored["upstream"])
        found = {"y": y, "grad_x": x.grad, "grad_w": w.grad, "grad_alpha": clip.clip_max.grad}
        for name, value in found.items():
            assert_close(value, stored[name][i], file, like=stored[name])
