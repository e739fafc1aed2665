"""Laws of bit planes, their optimizer, dynamic ranges and lean layers; BSQ's settings, trainings and artefacts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from trainables import checkpoint
from trainables.build import build_model, layer_table
from trainables.config import TrialConfig, parse
from trainables.cost import INPUT_BITS, LayerBits
from trainables.errors import ConfigError
from trainables.fit import Report, Session, fit
from trainables.layer_bits import resolve_bits
from trainables.methods._binary_digits import place_values
from trainables.methods._bit_plane_sgd import BitPlaneSGD
from trainables.methods._bit_planes import BitPlanes, bit_tensors, penalty
from trainables.methods._bit_report import (
    PlaneRow,
    bit_state,
    count,
    float_state,
    plane_table,
    save_bits,
    save_float,
    scheme,
)
from trainables.methods._dynamic_range import AsItComes, CodedConv2d, DynamicRange, put_at_relus
from trainables.methods._lean_layers import (
    PIECE,
    LeanReLU,
    codes_per_byte,
    masked,
    pack_codes,
    pack_mask,
    pieces,
    unpack_codes,
)
from trainables.methods.bsq import Method
from trainables.modules import QuantizedConv2d

widths = st.integers(1, 8)
seeds = st.integers(0, 2**16)


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def converted(weight: Tensor, planes: int, **options: Any) -> tuple[BitPlanes, nn.Parameter]:
    """Planes and their leaf."""
    tensor, leaf = BitPlanes(weight.shape, planes, **options), nn.Parameter(weight.clone())
    tensor.calibrate(leaf)
    return tensor, leaf


def trained(planes: int, seed: int, **options: Any) -> tuple[BitPlanes, nn.Parameter]:
    """Planes that left 0 and 1, as in the middle of training; some elements saturate."""
    tensor, leaf = converted(random((4, 3, 2, 2), seed), planes, **options)
    noise = torch.rand(planes, 2, 48, generator=torch.Generator().manual_seed(seed + 1))
    tensor.bit_planes[:planes].add_(noise * 0.6).clamp_(0, 2)
    tensor.compose(leaf)
    return tensor, leaf


# Bit planes


@given(widths, seeds, st.floats(1e-3, 1e3))
def test_a_converted_tensor_is_within_half_a_step_and_its_planes_are_disjoint_bits(planes, seed, scale):
    weight = random((5, 7), seed, scale)
    tensor, leaf = converted(weight, planes)
    step = float(tensor.scale) / (2**planes - 1)
    assert float((leaf - weight).abs().max()) <= step * 0.5001
    assert float(tensor.scale) == float(weight.abs().max())
    bits = tensor.bit_planes
    assert set(bits.unique().tolist()) <= {0.0, 1.0}
    assert not bool((bits[:, 0] * bits[:, 1]).any())
    assert not bool(bits[planes:].any())
    codes = tensor.codes()
    assert torch.equal(codes, codes.round())
    assert float(codes.abs().max()) == 2**planes - 1


@given(widths, seeds)
def test_converting_twice_changes_nothing(planes, seed):
    tensor, leaf = converted(random((5, 7), seed), planes)
    once, before = leaf.detach().clone(), tensor.bit_planes.clone()
    tensor.calibrate(leaf)
    assert torch.equal(leaf, once)
    assert torch.equal(tensor.bit_planes, before)


@given(st.integers(0, 8))
def test_a_width_is_the_planes_and_a_sign(planes):
    tensor = BitPlanes((3,), planes)
    assert tensor.planes == planes
    assert tensor.bits == (planes + 1 if planes else 0)
    assert float(place_values(planes).sum()) == pytest.approx(1.0 if planes else 0.0)


@given(widths, seeds)
def test_requantization_without_growth_keeps_the_values_and_with_it_the_sums(planes, seed):
    tensor, _ = trained(planes, seed)
    sums, values, scale = tensor.normalized() * tensor.scale, tensor.values(), float(tensor.scale)
    tensor.requantize()
    if tensor.planes == planes and planes < 8:
        torch.testing.assert_close(tensor.values(), values)
    elif planes < 8:
        assert tensor.planes == planes + 1
        step = scale / (2**planes - 1)
        assert float((tensor.values().flatten() - sums).abs().max()) <= step * 0.501
    else:
        assert tensor.planes == 8
        torch.testing.assert_close(tensor.values(), values)


@given(widths, seeds, st.integers(0, 7), st.integers(0, 7))
def test_dropping_empty_planes_keeps_the_values_and_leaves_none_at_the_ends(planes, seed, low, high):
    tensor, leaf = converted(random((6, 6), seed), planes)
    codes = tensor.codes()
    mask = sum(2**i for i in range(planes) if low <= i <= high)
    tensor._write(codes.sign() * (codes.abs().int() & mask))
    before = tensor.values()
    tensor.adjust(leaf)
    torch.testing.assert_close(tensor.values(), before)
    torch.testing.assert_close(leaf.data, before)
    shares = tensor.shares()
    assert tensor.planes <= max(1, min(high, planes - 1) - low + 1)
    assert tensor.planes == 1 or (shares[0] > 0 and shares[-1] > 0)


def test_several_folded_planes_saturate_what_used_any_of_them_but_the_public_code_forgets_the_first():
    codes = torch.zeros(100)
    codes[:50], codes[50], codes[51] = 1, 8, 4  # each top plane serves one element in a hundred
    values = {}
    for as_published in (False, True):
        tensor = BitPlanes((100,), 4)
        tensor.scale.fill_(15.0)
        tensor._write(codes)
        tensor.prune(3.0, as_published=as_published)
        values[as_published] = tensor.codes().tolist()
        assert values[as_published][:50] == [1.0] * 50
    assert values[False][50:52] == [1.0, 1.0]
    assert values[True][50:52] == [0.0, 1.0]


def test_a_tensor_of_zeros_has_one_empty_plane_until_it_is_frozen_and_then_none():
    tensor, leaf = converted(torch.zeros(4, 4), 5)
    tensor.adjust(leaf)
    assert (tensor.planes, tensor.shares()) == (1, [0.0])
    tensor.freeze(leaf)
    assert (tensor.planes, tensor.shares(), tensor.bits) == (0, [], 0)
    assert not bool(leaf.any())


def test_changing_the_bits_rounds_the_values_anew():
    weight = random((40,), 3)
    tensor, leaf = converted(weight, 8)
    tensor.set_bits(4)
    tensor.compose(leaf)
    assert tensor.planes == 3
    assert leaf.unique().numel() <= 15
    assert float((leaf - weight).abs().max()) <= float(tensor.scale) * (0.5 / 7 + 0.5 / 255) * 1.001


# The optimizer


class Graph:
    """The same tensor as a plain graph: planes and scale are parameters, and autograd does the rest."""

    def __init__(self, tensor: BitPlanes):
        self.steps = float(tensor.q_max)
        self.frozen, self.penalty = tensor.frozen, tensor.penalty
        self.rows = nn.Parameter((tensor.latent if tensor.frozen else tensor.bit_planes[: tensor.planes]).clone())
        self.scale = nn.Parameter(tensor.scale.clone())

    def values(self) -> Tensor:
        u = self.rows
        if not self.frozen:
            u = ((u[:, 0] - u[:, 1]) * place_values(len(u)).unsqueeze(1)).sum(0)
        q = (u.detach().clamp(-1, 1) * self.steps).round() / self.steps
        return self.scale * (u + (q - u).detach())

    def lasso(self) -> Tensor:
        if self.frozen:
            return torch.zeros(())
        norms = (1e-8 + self.rows.square().sum(dim=(1, 2))).sqrt()
        return self.penalty * len(self.rows) * norms.sum()

    @torch.no_grad()
    def clamp(self) -> None:
        self.rows.clamp_(-1.0 if self.frozen else 0.0, 1.0 if self.frozen else 2.0)


@settings(max_examples=40)
@given(widths, seeds, st.booleans(), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.9]))
def test_steps_are_those_of_sgd_through_a_graph_of_all_planes(planes, seed, frozen, strength, momentum):
    tensor, leaf = trained(planes, seed, penalty=strength)
    if frozen:
        tensor.freeze(leaf)
    graph = Graph(tensor)
    keys = {"lr": 0.05, "momentum": momentum, "weight_decay": 1e-2}
    ours = BitPlaneSGD([{"params": [leaf], "bit_planes": [tensor], **keys}])
    plain = torch.optim.SGD([graph.rows, graph.scale], **keys)
    target = random(tuple(leaf.shape), seed + 2)
    for _ in range(4):
        ours.zero_grad()
        plain.zero_grad()
        (leaf - target).square().sum().backward()
        task = (graph.values().view_as(target) - target).square().sum()
        lasso = graph.lasso()
        assert float(penalty([tensor])) == pytest.approx(float(lasso.detach()), rel=1e-5)
        (task + lasso).backward()
        for_rows, for_scale = tensor.gradients(leaf.grad)
        torch.testing.assert_close(for_rows, graph.rows.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(for_scale, graph.scale.grad, rtol=1e-4, atol=1e-4)
        ours.step()
        plain.step()
        graph.clamp()
        rows = tensor.latent if frozen else tensor.bit_planes[:planes]
        torch.testing.assert_close(rows, graph.rows.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensor.scale, graph.scale.data, rtol=1e-4, atol=1e-5)
        with torch.no_grad():  # values near the edge of a rounding may fall on either side
            graph.rows.copy_(rows)
            graph.scale.copy_(tensor.scale)


def test_a_penalty_without_strength_is_nothing():
    tensor, _ = trained(4, 0)
    assert float(penalty([tensor])) == 0
    assert not bool(tensor.plane_norms.any())


def test_the_momentum_survives_a_state_dict():
    runs = []
    for restored in (False, True):
        tensor, leaf = trained(5, 1, penalty=0.1)
        groups = [{"params": [leaf], "bit_planes": [tensor], "lr": 0.1}]
        optimizer = BitPlaneSGD(groups)
        for step in range(4):
            if restored and step == 2:
                state = optimizer.state_dict()
                optimizer = BitPlaneSGD(groups)
                optimizer.load_state_dict(state)
                assert optimizer.tensors[leaf] is tensor
            leaf.grad = random(tuple(leaf.shape), step)
            optimizer.step()
        runs.append(tensor.bit_planes.clone())
    assert torch.equal(*runs)


# Activations and lean layers


@given(st.integers(1, 8), seeds, st.booleans(), st.sampled_from([0.5, 3.0]))
def test_activations_have_as_many_levels_as_their_width_and_are_within_half_a_step(bits, seed, signed, scale):
    bits = max(2, bits) if signed else bits
    x = random((6, 50), seed, scale)
    quantizer = DynamicRange(bits, signed=signed)
    y = quantizer(x).detach()
    clipped = x if signed else x.clamp(0, quantizer.clip_max.item())
    assert y.unique().numel() <= 2**bits
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    assert float((y - clipped).abs().max()) <= float(clipped.abs().max()) / steps * 0.5001
    torch.testing.assert_close(quantizer(y).detach(), y)


@pytest.mark.parametrize("signed", [False, True])
def test_zeros_stay_zeros(signed):
    assert torch.equal(DynamicRange(4, signed=signed)(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_a_running_range_makes_evaluation_independent_of_the_batch():
    x, large = random((8, 4), 0), random((8, 4), 1, 3.0)
    outputs = {}
    for running in (False, True):
        quantizer = DynamicRange(4, running=running)
        quantizer(x)
        quantizer.eval()
        outputs[running] = torch.equal(quantizer(x), quantizer(torch.cat([x, large]))[:8])
    assert outputs == {False: False, True: True}


def test_the_running_range_follows_the_batches():
    quantizer = DynamicRange(4, running=True)
    quantizer(torch.tensor([1.0]))
    assert float(quantizer.running_largest) == 1.0
    quantizer(torch.tensor([2.0]))
    assert float(quantizer.running_largest) == pytest.approx(1.1)


@pytest.mark.parametrize("length", [1, 7, 8, 24, PIECE, PIECE + 8, 2 * PIECE + 3])
def test_a_packed_mask_keeps_what_is_not_zero(length):
    x, g = random((length,), 0).clamp_min(0), random((length,), 1)
    packed = pack_mask(iter(pieces(x)), length, x)
    assert packed.numel() == (length // 8 if length % 8 == 0 else length)
    assert torch.equal(masked(g, packed, (x.shape, x.stride())), g * (x > 0))


@given(st.integers(1, 255), st.integers(1, 30), seeds)
def test_packed_codes_come_back(steps, length, seed):
    codes = torch.randint(0, steps + 1, (length,), generator=torch.Generator().manual_seed(seed)).float()
    packed = torch.empty(length // codes_per_byte(steps, length), dtype=torch.uint8)
    assert packed.numel() == (length // 2 if steps <= 15 and length % 2 == 0 else length)
    pack_codes(codes, packed, steps)
    assert torch.equal(unpack_codes(packed, torch.empty(length)), codes)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(2, 3) if layout == "transposed" else x


layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])


@layouts
@pytest.mark.parametrize("height", [4, 5])
def test_a_lean_relu_is_a_relu_bit_for_bit(layout, height):
    x = laid_out(random((2, 3, height, 3), 0), layout)
    results = []
    for relu in (LeanReLU(), nn.ReLU()):
        leaf = x.clone().requires_grad_()
        y = relu(leaf * 1)
        y.backward(torch.ones_like(y) * 1.5)
        results.append((y, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@layouts
@pytest.mark.parametrize("bits", [2, 4, 7, 8, 9])
@pytest.mark.parametrize("signed", [False, True])
def test_a_convolution_that_keeps_codes_is_the_ordinary_one_bit_for_bit(layout, bits, signed):
    x = laid_out(random((3, 4, 80, 80), 1, 3.0), layout)  # more than a piece
    results = []
    for kind in (CodedConv2d, QuantizedConv2d):
        conv = nn.Conv2d(4, 5, 3)
        tensor = BitPlanes(conv.weight.shape, 6)
        conv.weight.data, conv.bias.data = random(tuple(conv.weight.shape), 2), torch.ones(5)
        layer = kind(conv, tensor, DynamicRange(bits, signed=signed))
        tensor.calibrate(layer.weight)
        leaf = x.clone().requires_grad_()
        y = layer(leaf * 1)
        y.square().sum().backward()
        grads = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([y, leaf.grad, *grads])
    assert len(results[0]) == 4 + (bits <= 3 and not signed)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_quantizers_at_relus_leave_the_first_alone_and_take_the_width_of_the_next_layer():
    relu, conv = nn.ReLU, nn.Conv2d
    model = nn.Sequential(conv(1, 2, 3), relu(), conv(2, 2, 3), relu(), conv(2, 2, 3), relu(), conv(2, 2, 3), relu())
    assert put_at_relus(model, {"0": 8, "2": 3, "4": 4, "6": 5}) == [4, 5, 5]
    assert type(model[1]) is nn.ReLU
    assert [model[i].bits for i in (3, 5, 7)] == [4, 5, 5]


@pytest.mark.parametrize(("levels", "expected"), [(2, 4), (16, 4), (17, 8), (256, 8), (257, 32)])
def test_what_a_layer_reads_has_the_first_width_that_suffices(levels, expected):
    reads = AsItComes([4, 8])
    reads.calibrate(torch.arange(levels).float())
    assert reads.bits == expected
    assert torch.equal(reads(torch.ones(2)), torch.ones(2))


# The method


def config(model: Any = "lenet5", data: str = "digits", **more: Any) -> TrialConfig:
    method = {"name": "bsq", "interval": 1, **more.pop("method", {})}
    tree = {"method": method, "model": model, "data": data, **more}
    return parse({"optimizer": {"lr": 0.02}, "training": {"epochs": 2}, **tree})


SMALL = {"name": "resnet20", "depth": 8, "width": 4}


def prepared(given: TrialConfig) -> tuple[Method, nn.Module]:
    table = layer_table(given)
    shape = (3, 32, 32) if given.data.name == "cifar10" else (1, 8, 8)
    model = build_model(given, 10, shape, seed=0)
    method = Method(Method.Settings(**given.method.settings), epochs=given.search_epochs)
    method.prepare(model, table, resolve_bits(given, table))
    method.calibrate(model, random((4, *shape), 0))
    return method, model


def test_settings_have_the_papers_defaults_and_a_strength_of_zero_is_allowed():
    assert (Method.Settings().start_planes, Method.Settings().interval, Method.Settings().threshold) == (8, 100, 0.0)
    assert config(method={"penalty_strength": 0}).method.settings["penalty_strength"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"penalty_strength": -0.1}, "method/penalty_strength = -0.1: input should be greater than or equal to 0"),
        ({"interval": 0}, "method/interval = 0: input should be greater than or equal to 1"),
        ({"start_planes": 9}, "method/start_planes = 9: input should be less than or equal to 8"),
        ({"threshold": 100}, "method/threshold = 100: input should be less than 100"),
        ({"placement": "outputs"}, "method/placement = 'outputs'"),
        ({"scheme": "no/such/file.json"}, "method/scheme = 'no/such/file.json': .*give a JSON file"),
        ({"scheme": {"conv1": [9, 0]}}, "method/scheme/conv1/0 = 9: input should be less than or equal to 8"),
        ({"alpha": 1.0}, "unknown address 'method/alpha'"),
    ],
)
def test_a_bad_setting_is_a_clear_error(given, message):
    with pytest.raises(ConfigError, match=message):
        config(method=given)


LENET = {"conv1": (3, 2), "conv2": (2, 2), "fc1": (2, 0), "fc2": (4, 3)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": {"conv1": [2, 0]}}, r"method/scheme: is of another network: lacks conv2 \(3 layers differ\)"),
        ({"scheme": {**LENET, "conv3": [1, 0]}}, r"is of another network: has conv3; did you mean 'conv\d'\?"),
        ({"scheme": LENET, "penalty_strength": 0.1}, "method/penalty_strength = 0.1: has no effect with method/scheme"),
        ({"float_layers": ["fc9"]}, "method/float_layers = 'fc9': no such layer; did you mean 'fc"),
        ({"float_inputs": ["block*"]}, r"method/float_inputs = 'block\*': no such layer"),
        ({"float_layers": ["*"]}, "leaves nothing to quantize; take method 'float'"),
        ({"float_inputs": ["fc1"], "placement": "relus"}, "method/float_inputs: has no effect with method/placement"),
    ],
)
def test_a_setting_of_another_network_or_without_effect_is_an_error(given, message):
    trial = config(method={"interval": Method.Settings().interval, **given})
    with pytest.raises(ConfigError, match=message):
        resolve_bits(trial, layer_table(trial))


def test_planes_for_biases_that_a_layer_lacks_are_an_error():
    names = [row.name for row in layer_table(config(SMALL, "cifar10")).quantizable]
    trial = config(SMALL, "cifar10", method={"interval": 100, "scheme": dict.fromkeys(names, (2, 2))})
    with pytest.raises(ConfigError, match=r"method/scheme/conv1 = 2 planes for biases: the layer has none; give 0"):
        resolve_bits(trial, layer_table(trial))


def test_weight_bits_cannot_be_given():
    trial = config(bits={"conv2": {"weight": 4}})
    with pytest.raises(ConfigError, match="bits/conv2/weight: method 'bsq' learns its weight bits; leave it out"):
        resolve_bits(trial, layer_table(trial))


def test_a_scheme_file_is_read_into_the_configuration(tmp_path: Path):
    path = tmp_path / "scheme.json"
    path.write_text(json.dumps(LENET))
    given = config(method={"interval": 100, "scheme": str(path)})
    assert {name: tuple(widths) for name, widths in given.method.settings["scheme"].items()} == LENET
    assert parse(json.loads(json.dumps(given.tree()))) == given
    path.write_text("{")
    with pytest.raises(ConfigError, match="give a JSON file"):
        config(method={"scheme": str(path)})


def test_a_float_checkpoint_that_lacks_tensors_is_an_error(tmp_path: Path):
    model = build_model(config(), 10, (1, 8, 8), seed=0)
    path = tmp_path / "start.safetensors"
    save_float(path, nn.ModuleDict({"conv1": model.get_submodule("conv1")}))
    with pytest.raises(ConfigError, match=r"of another model: lacks conv2\.weight"):
        next(fit(config(), start=path))


def test_relus_are_needed_where_quantizers_are_put_at_them():
    trial = config(method={"placement": "relus"})
    table = layer_table(trial)
    with pytest.raises(ConfigError, match="the model has no two ReLU modules; take 'inputs'"):
        Method(Method.Settings(placement="relus")).prepare(nn.Sequential(), table, resolve_bits(trial, table))


def test_the_published_placement_reads_floats_after_the_first_relu_and_the_pool():
    trial = config(
        SMALL,
        "cifar10",
        method={"placement": "relus", "float_layers": ["*.downsample.0"]},
        bits={"fc": {"activation": 4}},
    )
    method, model = prepared(trial)
    (point,) = method.points(model)
    reads = {name: width.activation for name, width in point.bits.items()}
    assert reads.pop("conv1") == INPUT_BITS
    assert (reads.pop("layer1.0.conv1"), reads.pop("fc")) == (32, 32)
    assert set(reads.values()) == {4}
    assert not [name for name in reads if "downsample" in name]


def test_layers_can_stay_float_or_read_floats():
    trial = config(SMALL, "cifar10", method={"float_layers": ["*.downsample.0"], "float_inputs": ["fc"]})
    method, model = prepared(trial)
    (point,) = method.points(model)
    assert "layer2.0.downsample.0" not in point.bits
    assert point.bits["fc"] == LayerBits(weight=9, activation=32)
    assert type(model.get_submodule("layer2.0.downsample.0")) is nn.Conv2d


def test_the_leaves_are_what_ranks_average_and_every_parameter_is_in_one_group():
    method, model = prepared(config(SMALL, "cifar10"))
    planes, others = method.groups(model)
    assert {id(p) for p in planes["params"]} == {id(leaf) for _, _, _, leaf in bit_tensors(model)}
    assert {id(p) for p in [*planes["params"], *others["params"]]} == {id(p) for p in model.parameters()}


def test_a_dead_layer_has_no_bits_and_no_planes_in_its_scheme():
    method, model = prepared(config())
    for layer, role, tensor, leaf in bit_tensors(model):
        if (layer, role) == ("conv2", "weight"):
            tensor.calibrate(leaf.data.zero_())
            tensor.adjust(leaf)
    (point,) = method.points(model)
    assert point.bits["conv2"].weight == 0
    assert point.bits["conv1"].weight > 0
    assert scheme(model)["conv2"][0] == 0
    assert point.extra_floats == 3


def test_details_tell_planes_and_ones():
    method, model = prepared(config())
    details = method.details(model)
    assert set(details) == {name for name, _ in method.points(model)[0].bits.items()}
    assert details["conv1"]["planes"] == 8
    assert len(details["conv1"]["ones_percent"].split()) == 8
    assert plane_table(model)[0] == PlaneRow(
        layer="conv1", role="weight", planes=8, shares=tuple(map(float, next(bit_tensors(model))[2].shares()))
    )


def test_the_public_clamp_hits_parameters_by_their_names():
    found = {}
    for as_published in (False, True):
        method, model = prepared(
            config(SMALL, "cifar10", method={"float_layers": ["*.downsample.0"], "as_published": as_published})
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.get_parameter("bn1.weight").data.fill_(-1.0)
        before["bn1.weight"].fill_(-1.0)
        method.after_step(model)
        found[as_published] = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert found[False] == set()
    assert found[True] == {"layer2.0.downsample.0.weight", "layer3.0.downsample.0.weight"}


@pytest.mark.parametrize("as_published", [False, True])
def test_fine_tuning_keeps_the_biases_unless_as_published(as_published):
    method, model = prepared(config(method={"as_published": as_published}))
    before = float_state(model)["fc2.bias"].clone()
    method.freeze(model)
    assert bool(model.get_parameter("fc2.bias").any()) != as_published
    trained_leaves = {id(p) for p in method.groups(model)[0]["params"]}
    assert (id(model.get_parameter("fc2.bias")) in trained_leaves) != as_published
    torch.testing.assert_close(float_state(model)["fc2.bias"], before)


# Trainings


def last(reports: Iterator[Report]) -> Report:
    return list(reports)[-1]


def states(path: Path) -> dict[str, Tensor]:
    return checkpoint.read(path / checkpoint.FILE)[0]


def digits(method: dict[str, Any], **training: int) -> TrialConfig:
    rates = {"lr": 0.1, "finetune_factor": 0.5}
    return parse(
        {
            "method": {"name": "bsq", **method},
            "model": SMALL,
            "data": "digits",
            "optimizer": rates,
            "training": {"batch_size": 64, **training},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialConfig, list[Report], Path]:
    """Two epochs of search under a strong penalty, two of fine-tuning."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    given = digits({"interval": 1, "penalty_strength": 1.0}, epochs=4, finetune_epochs=2)
    return given, list(fit(given, folder=folder)), folder


def test_a_training_ends_in_a_point_with_fewer_bits(run):
    _, reports, _ = run
    sizes = [report.points[0].size_bytes for report in reports]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3]  # fixed from the end of the search
    weights = {width for width, _ in reports[-1].points[0].bits.values()}
    assert len(weights) > 2
    assert weights <= set(range(10))
    assert reports[-1].points[0].accuracy > 0.5


def test_the_reported_loss_has_the_penalty_in_it_during_the_search(run):
    _, reports, _ = run
    assert reports[1].train_loss > 10 > 3 > reports[2].train_loss


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resumed_training_is_the_uninterrupted_one(run, after, tmp_path: Path):
    given, reports, folder = run
    training = fit(given, folder=tmp_path)
    for _ in range(after):
        next(training)
    training.close()
    resumed = list(fit(given, folder=tmp_path))
    assert [r.points for r in resumed] == [r.points for r in reports[after - 1 :]]
    ours, wanted = states(tmp_path), states(folder)
    assert set(ours) == set(wanted)
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []


def test_a_saved_training_gives_its_points_again(run):
    given, reports, folder = run
    session = Session(given)
    session.load(folder / checkpoint.FILE)
    assert session.measure(session.data.validation) == reports[-1].points
    assert [row["planes"] for row in session.layers("final")] == [w for w, _ in scheme(session.model).values()]


def test_both_artefacts_hold_the_same_network(run, tmp_path: Path):
    given, _, folder = run
    session = Session(given)
    session.load(folder / checkpoint.FILE)
    save_float(tmp_path / "float", session.model)
    save_bits(tmp_path / "bits", session.model)
    plain = build_model(given, 10, session.data.input_shape, seed=1)
    checkpoint.load_weights(tmp_path / "float", plain)
    with safe_open(tmp_path / "bits", framework="pt") as file:
        bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = json.loads(file.metadata()["scheme"])
    assert found == {layer: list(pair) for layer, pair in scheme(session.model).items()}
    for layer, role, tensor, leaf in bit_tensors(session.model):
        planes = max(1, tensor.planes)
        values = (bits[f"{layer}.p{role}"].float() - bits[f"{layer}.n{role}"].float()) @ place_values(planes)
        rebuilt = values * bits[f"{layer}.{'scale' if role == 'weight' else 'biasscale'}"]
        torch.testing.assert_close(rebuilt, plain.get_parameter(f"{layer}.{role}").data, rtol=1e-5, atol=1e-7)
        assert torch.equal(leaf.data, plain.get_parameter(f"{layer}.{role}").data)
    assert set(bits) == set(bit_state(session.model))


def test_a_found_scheme_can_be_trained_from_the_float_start(run):
    given, reports, folder = run
    session = Session(given)
    session.load(folder / checkpoint.FILE)
    found = scheme(session.model)
    again = digits({"scheme": found}, epochs=1)
    (report,) = list(fit(again))
    assert {n: w for n, (w, _) in report.points[0].bits.items()} == {
        n: w for n, (w, _) in reports[-1].points[0].bits.items()
    }
    table = layer_table(again)
    assert count(table, found).bits <= count(table, found, dead=1).bits


def test_without_a_penalty_the_network_stays_larger(run):
    _, reports, _ = run
    report = last(fit(digits({"interval": 1, "penalty_strength": 0.0}, epochs=1)))
    assert report.points[0].size_bytes > reports[0].points[0].size_bytes
