"""BSQ against arrays that the authors' code computed: planes, penalty, pruning, activations, layers."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.golden_vectors import index
from tests.trainables.golden_bsq import LAYER, PLANES, Settings, Tensors, arrays, compare, listed, part, raw
from trainables import modules
from trainables.methods._binary_digits import place_values, used
from trainables.methods._bit_planes import BitPlanes, penalty
from trainables.methods._dynamic_range import CodedConv2d, DynamicRange


def tensor_of(stored: Tensors, role: str = "weight", **options: Any) -> BitPlanes:
    """The stored planes in our form."""
    positive, negative = stored[f"p{role}"], stored[f"n{role}"]
    planes = positive.shape[-1]
    tensor = BitPlanes(positive.shape[:-1], planes, **options)
    for sign, whole in enumerate((positive, negative)):
        tensor.bit_planes[:planes, sign] = whole.movedim(-1, 0).reshape(planes, -1)
    tensor.scale.copy_(stored["scale" if role == "weight" else "biasscale"].reshape(()))
    return tensor


def roles(stored: Tensors) -> list[str]:
    return ["weight", "bias"] if "pbias" in stored or "bias" in stored else ["weight"]


def layer_of(tensors: dict[str, BitPlanes], settings: Settings) -> nn.Module:
    """A quantized layer around the tensors."""
    shape, bias = tensors["weight"].shape, "bias" in tensors
    if settings["layer"] == "linear":
        linear = nn.Linear(shape[1], shape[0], bias=bias)
        layer: Any = modules.QuantizedLinear(linear, tensors["weight"], None)
    else:
        groups = settings.get("groups", 1)
        options = {"groups": groups, "stride": settings.get("stride", 1), "padding": settings.get("padding", 0)}
        conv = nn.Conv2d(shape[1] * groups, shape[0], shape[2:], bias=bias, **options)
        layer = CodedConv2d(conv, tensors["weight"], None)
    for role, tensor in tensors.items():
        tensor.compose(getattr(layer, role))
    return layer


@listed("convert.npz")
def test_a_float_tensor_becomes_the_published_planes_and_comes_back(settings, stored):
    computed: Tensors = {}
    for role in roles(stored):
        planes = settings["bits"] if role == "weight" else settings["bias_bits"]
        tensor = BitPlanes(stored[role].shape, planes)
        tensor.calibrate(stored[role].clone())
        assert max(1, tensor.planes) == settings["bits_after" if role == "weight" else "bias_bits_after"]
        computed |= raw(tensor, role) | {role: stored[role], f"{role}_effective": tensor.values()}
        if role == "weight":
            assert tensor.planes == settings["bits_after_back_to_float"]
            assert (tensor.planes == 0) == settings["zero_flag"]
            computed |= {"plane_value": place_values(tensor.planes), "weight_back": tensor.values()}
            computed["percent_nonzero"] = used(tensor.bit_planes[: max(1, planes)])
    compare(computed, stored, exact=PLANES, rtol=1e-6, atol=0)


@listed("forward.npz")
def test_float_planes_give_the_published_output_and_gradients(settings, stored):
    tensors = {role: tensor_of(stored, role) for role in roles(stored)}
    layer = layer_of(tensors, settings)
    x = stored["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(stored["upstream_y"])
    computed = {"y": y, "dy.x": x.grad, "weight_unquantized": tensors["weight"].normalized()}
    for role, tensor in tensors.items():
        gradients = {"dy": getattr(layer, role).grad}
        if role == "weight":
            gradients["dW"] = stored["upstream_W"]
        for name, gradient in gradients.items():
            for_planes, for_scale = tensor.gradients(gradient)
            scale = {"weight": "scale", "bias": "biasscale"}[role]
            computed |= {f"{name}.{key}": g for key, g in raw(tensor, role, for_planes).items()}
            computed[f"{name}.{scale}"] = for_scale
        computed |= raw(tensor, role) | {f"{role}_effective": getattr(layer, role)}
    given = {"x": stored["x"], "upstream_W": stored["upstream_W"], "upstream_y": stored["upstream_y"]}
    compare(computed | given, stored, rtol=1e-5, atol=1e-5)
    saturated = float((tensors["weight"].normalized().abs() > 1).float().mean())
    assert saturated == pytest.approx(settings["fraction_saturated"], abs=1e-6)


@pytest.mark.parametrize("case", index("bsq")["files"]["reg.npz"]["cases"])
def test_the_penalty_and_its_gradients_are_the_published_ones(case):
    settings, stored = index("bsq")["files"]["reg.npz"]["cases"][case], arrays("reg.npz")
    total = 0.0
    tensors, computed = [], {}
    for name in settings["layers"]:
        layer = part(stored, name)
        for role in roles(layer):
            elements = layer[f"p{role}"][..., 0].numel()
            share = elements / settings["total_param"]
            tensor = tensor_of(layer, role, penalty=settings["alpha"] * share)
            leaf = torch.zeros(tensor.shape)
            tensor.compose(leaf)
            assert tensor.planes == settings["layers"][name][f"{role}_bits"]
            tensors.append(tensor)
            total += elements
            for_planes, _ = tensor.gradients(torch.zeros_like(leaf))
            computed |= {f"{name}.{key}": x for key, x in raw(tensor, role).items()}
            if role == "weight":
                computed[f"{name}.group_norm"] = tensor.plane_norms[: tensor.planes]
            for key, x in raw(tensor, role, for_planes).items():
                if "scale" not in key:
                    computed[f"{name}.dpen.{key}"] = x
    assert total == settings["total_param"]
    computed[f"{case}.penalty"] = penalty(tensors)
    computed[f"{case}.reg"] = computed[f"{case}.penalty"] * settings["total_param"] / settings["alpha"]
    compare(computed, stored, rtol=1e-5, atol=1e-9)


@listed("adjust.npz")
def test_requantization_and_pruning_give_the_published_planes(settings, stored):
    before, computed = part(stored, "before"), {}
    bits = []
    for role in roles(before):
        tensor = tensor_of(before, role)
        scale = "scale" if role == "weight" else "biasscale"
        computed |= {f"before.{name}": x for name, x in before.items() if name.endswith(role) or name == scale}
        computed[f"before.{role}_effective"] = tensor.values()
        tensor.requantize()
        assert tensor.planes == settings["bits_after_quant" if role == "weight" else "bias_bits_after_quant"]
        computed |= {f"quant.{name}": x for name, x in raw(tensor, role).items()}
        computed[f"quant.{role}_effective"] = tensor.values()
        if role == "weight":
            computed["quant.percent_nonzero"] = used(tensor.bit_planes[: tensor.planes])
        tensor.prune(settings["threshold_percent"], as_published=True)
        bits.append(tensor.planes)
        computed |= {f"prune.{name}": x for name, x in raw(tensor, role).items()}
        computed[f"prune.{role}_effective"] = tensor.values()
        if role == "weight":
            computed["prune.plane_value"] = place_values(tensor.planes)
        tensor.freeze(torch.zeros(tensor.shape))
        computed[f"finetune.{role}"] = tensor.latent
        assert tensor.planes == settings["bits_in_finetune_mode" if role == "weight" else "bias_bits_in_finetune_mode"]
    assert [*bits, 0][:2] == settings["scheme_entry"]
    compare(computed, stored, exact=PLANES, **LAYER)


@listed("act.npz")
def test_activations_are_clipped_and_rounded_as_published(settings, stored):
    x, bits = stored["x"].clone().requires_grad_(), settings["bits"]
    computed = {"x": stored["x"], "upstream": stored["upstream"]}
    if bits == 0:
        y = x * 1  # no quantizer: `method/float_inputs`
    elif "max_abs" in settings:  # the rounding alone, without a clip: the sign takes a bit
        quantizer = DynamicRange(bits + 1, signed=True)
        y = quantizer(x)
        assert float(quantizer._range(stored["x"])[0]) == pytest.approx(settings["max_abs"])
    else:
        quantizer = DynamicRange(bits)
        if "alpha" in settings:
            quantizer.clip_max.data.fill_(settings["alpha"])
        y = quantizer(x)
        assert isinstance(quantizer.clip_max, nn.Parameter) == ("alpha" in settings)
        computed["clipped"] = stored["x"].clamp(0, quantizer.clip_max.item())
    y.backward(stored["upstream"])
    computed |= {"y": y, "dx": x.grad}
    if "dalpha" in stored:
        computed["dalpha"] = quantizer.clip_max.grad
    compare(computed, stored, **LAYER)


@listed("finetune.npz")
def test_a_layer_at_fixed_width_gives_the_published_values_gradients_and_exports(settings, stored):
    bits = part(stored, "bits")
    tensors = {role: tensor_of(bits, role) for role in roles(bits)}
    layer = layer_of(tensors, settings)
    computed = {f"bits.{name}": x for name, x in bits.items()}
    for role, tensor in tensors.items():
        tensor.freeze(getattr(layer, role), mute=role == "bias")
        computed[f"ft.{role}"] = tensor.latent.clone()
    weight = tensors["weight"]
    assert weight.planes == settings["bits_ft"]
    assert "bias" not in tensors or tensors["bias"].planes == settings["bias_bits_ft"]
    weight.latent.copy_(stored["train.weight"].reshape(-1))
    weight.compose(layer.weight)
    x = stored["train.x"].clone().requires_grad_()
    y = layer(x)
    y.backward(stored["train.upstream"])
    for_latent, for_scale = weight.gradients(layer.weight.grad)
    computed |= {f"train.{name}": stored[f"train.{name}"] for name in ("weight", "x", "upstream")}
    computed |= {"train.weight_effective": layer.weight, "train.y": y, "train.dx": x.grad}
    computed |= {"train.dweight": for_latent, "train.dscale": for_scale, "ft.scale": weight.scale}
    assert max(1, weight.planes) == settings["bits_bin"]
    assert weight.planes == settings["bits_float"]
    assert (weight.planes == 0) == settings["zero_flag_bin"]
    for role, tensor in tensors.items():
        positive, negative = tensor.binary_planes()
        scale = {"weight": "scale", "bias": "biasscale"}[role]
        computed |= {f"bin.p{role}": positive, f"bin.n{role}": negative, f"bin.{scale}": tensor.scale}
        computed |= {f"bin.{role}_effective": tensor.values(), f"float.{role}": tensor.values()}
        computed[f"ft.{scale}"] = tensor.scale
    compare(computed, stored, exact=PLANES, rtol=1e-5, atol=1e-5)
