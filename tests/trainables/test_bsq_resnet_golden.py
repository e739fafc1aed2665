"""BSQ against golden arrays: ResNet-20, its logits, sizes of schemes, and its first step."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import index
from tests.trainables.golden_bsq import FLOAT_NETWORK, Tensors, arrays, part, planes_of, raw
from trainables.cost import Bits, LayerBits, LayerTable
from trainables.layers import trace
from trainables.methods._bit_plane_sgd import BitPlaneSGD
from trainables.methods._bit_planes import bit_tensors, penalty
from trainables.methods._bit_report import count
from trainables.methods._dynamic_range import put_at_relus
from trainables.methods.bsq import Method
from trainables.models import resnet20


def float_resnet20() -> tuple[nn.Module, LayerTable]:
    """The released float network."""
    model = resnet20.build(10, (3, 32, 32))
    table = trace(model, (3, 32, 32))
    stored = {name.removeprefix("module."): x for name, x in arrays(str(FLOAT_NETWORK.resolve())).items()}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval(), table


def widths(table: LayerTable, activation: int) -> Bits:
    return {row.name: LayerBits(weight=32, activation=activation) for row in table.quantizable}


def published(table: LayerTable, model: nn.Module, activation: int, **settings: Any) -> Method:
    """The published placement on the published network."""
    method = Method(Method.Settings(placement="relus", float_layers=("*.downsample.0",), **settings))
    method.prepare(model, table, widths(table, activation))
    return method


@torch.no_grad()
def nearer_layout(model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
    """The images in the memory layout in which the logits come nearer to those wanted.

    Sums round differently in the last bit in each, and one activation at the edge of a rounding moves all logits.
    """
    layouts = [images, images.contiguous(memory_format=torch.channels_last)]
    return min(layouts, key=lambda x: float((model(x) - wanted).abs().max()))


def listed_logits() -> list[str]:
    names = index("bsq")["files"]["resnet20.npz"]["arrays"]
    return [name.removesuffix(".logits") for name in names if name.endswith(".logits")]


@torch.no_grad()
@pytest.mark.parametrize("name", listed_logits())
def test_resnet20_gives_the_published_logits(name):
    stored = arrays("resnet20.npz")
    model, table = float_resnet20()
    activation = re.search(r"act(\d+)", name)
    if name.startswith("w32_act"):
        assert activation is not None
        put_at_relus(model, {row.name: int(activation[1]) for row in table.quantizable})
    elif name != "fp32_relu":
        assert activation is not None
        layers = index("bsq")["schemes"][name.partition(".")[0]]["layers"]
        published(table, model, int(activation[1]), scheme=layers)
    model.eval()
    wanted = stored[f"{name}.logits"]
    logits = model(nearer_layout(model, stored["batch.x"], wanted))
    atol = 1e-4 if name == "fp32_relu" else 5e-2
    torch.testing.assert_close(logits, wanted, rtol=0, atol=atol)
    assert torch.equal(logits.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", index("bsq")["schemes"])
@pytest.mark.parametrize(("convention", "dead"), [("count_true", 0), ("count_bit_representation", 1)])
def test_the_size_of_a_scheme_is_the_published_one(name, convention, dead):
    table = trace(resnet20.build(10, (3, 32, 32)), (3, 32, 32))
    entry = index("bsq")["schemes"][name]
    found, wanted = count(table, entry["layers"], dead=dead), entry[convention]
    assert (found.parameters, found.bits) == (wanted["total_param"], wanted["total_bit"])
    assert found.average_bits == pytest.approx(wanted["avg_bits"], rel=1e-12)
    assert found.compression == pytest.approx(wanted["compression"], rel=1e-12)


def test_the_first_step_of_resnet20_has_the_published_losses_and_gradients():
    settings, stored = index("bsq")["files"]["resnet20.npz"]["cases"]["step"], arrays("resnet20.npz")
    model, table = float_resnet20()
    method = published(table, model, 4, penalty_strength=settings["alpha"])
    method.calibrate(model, stored["batch.x"])
    assert planes_of(model) == settings["scheme_after_initial_adjustment"]
    model.train()
    images = nearer_layout(model, stored["batch.x"], stored["step.logits_train"])
    tensors = list(bit_tensors(model))
    (loss,) = method.losses(model, images, stored["batch.target"])
    share = float(penalty(tensor for _, _, tensor, _ in tensors))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(settings["total_loss"], abs=1e-3)
    assert float(loss.detach()) - share == pytest.approx(settings["cross_entropy"], abs=1e-3)
    assert share == pytest.approx(settings["penalty"], rel=1e-5)
    assert share / settings["alpha"] * settings["total_param"] == pytest.approx(settings["reg"], rel=1e-5)
    regularizers: dict[str, float] = {}
    gradients: Tensors = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for layer, role, tensor, leaf in tensors:
        own = float(penalty([tensor])) / settings["alpha"] * settings["total_param"]
        regularizers[layer] = regularizers.get(layer, 0.0) + own
        assert leaf.grad is not None
        for_planes, for_scale = tensor.gradients(leaf.grad)
        gradients |= {f"{layer}.{name}": x for name, x in raw(tensor, role, for_planes).items()}
        gradients[f"{layer}.{'scale' if role == 'weight' else 'biasscale'}"] = for_scale
    assert regularizers == pytest.approx(settings["reg_per_layer"], rel=1e-5)
    for name, wanted in settings["grad_norm_per_parameter"].items():
        # What batch norm divides out has no gradient but for rounding.
        assert float(gradients[name].norm()) == pytest.approx(wanted, rel=2e-2, abs=1e-4), name
    with torch.no_grad():
        torch.testing.assert_close(model(images), stored["step.logits_train"], rtol=0, atol=5e-2)
    for name, wanted in part(stored, "step.grad").items():
        torch.testing.assert_close(gradients[name], wanted, rtol=2e-2, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


if not FLOAT_NETWORK.exists():  # then there is nothing to compare with
    del test_resnet20_gives_the_published_logits, test_the_first_step_of_resnet20_has_the_published_losses_and_gradients


def test_the_optimizer_of_planes_is_the_one_that_was_tested():
    model = resnet20.build(10, (3, 32, 32))
    table = trace(model, (3, 32, 32))
    planes, _ = published(table, model, 4).groups(model)
    assert planes["optimizer"] is BitPlaneSGD
    assert len(planes["params"]) == len(planes["bit_planes"]) == 21
