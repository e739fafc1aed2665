"""Sensitivities: our double-backward pass against autograd's, exact values on small networks, tables, bad input."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from trainables import sensitivity
from trainables.build import build_model
from trainables.config import parse
from trainables.cost import uniform
from trainables.curvature import (
    Traces,
    fisher_traces,
    hessian_traces,
    hutchinson,
    linear_by_layer,
    pooled,
    signs_like,
)
from trainables.errors import ConfigError
from trainables.layers import trace
from trainables.methods.lsq import Method

LAYERS = (nn.Conv2d, nn.Linear)


class Odd(nn.Module):
    """Strides, groups, dilation, biases, a layer called twice, one that never runs, a smooth activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.head = nn.Linear(4, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.norm(self.first(x)))
        x = functional.gelu(self.twice(x)) + x
        x = self.twice(x).mean(dim=(2, 3))
        return self.head(x)


def odd() -> nn.Module:
    torch.manual_seed(0)
    model = Odd().double()
    model.norm.running_mean.uniform_(-0.2, 0.2)
    model.norm.running_var.uniform_(0.5, 2)
    return model


def batch(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 8, 8, generator=generator).double(), torch.arange(count) % 3


def by_autograd(model: nn.Module, images: Tensor, labels: Tensor, names: list[str], probes: int, seed: int) -> Tensor:
    """The plain way: autograd's gradient of the gradient, with the same random signs."""
    model = copy.deepcopy(model).eval()
    weights = [model.get_submodule(name).weight for name in names]
    loss = functional.cross_entropy(model(images), labels)
    generator = torch.Generator().manual_seed(seed)
    signs = [[signs_like(w, generator) for w in weights] for _ in range(probes)]
    return torch.stack(list(hutchinson(loss, weights, signs)))


@pytest.mark.parametrize("layer", ["first", "twice", "head"])
def test_our_pass_gives_the_products_that_autograd_gives(layer):
    model, (images, labels) = odd(), batch()
    generator = torch.Generator().manual_seed(3)
    traces = hessian_traces(model, [(images, labels)], layers=[layer], probes=4, generator=generator)
    torch.testing.assert_close(traces.values, by_autograd(model, images, labels, [layer], 4, 3))


def test_all_layers_that_run_are_measured():
    traces = hessian_traces(odd(), [batch()], probes=1)
    assert traces.layers == ("first", "twice", "head")
    assert traces.weights == (72, 72, 12)


@pytest.mark.parametrize("network", ["lenet5", "resnet20", "mobilenet_v2"])
def test_our_pass_agrees_with_autograd_on_real_networks_in_both_layouts(network):
    settings = {"resnet20": {"depth": 8, "width": 4}, "lenet5": {"width": 0.1}, "mobilenet_v2": {"width": 0.1}}[network]
    config = parse({"method": "float", "model": {"name": network, **settings}, "data": "digits"})
    model = build_model(config, 5, (3, 32, 32), seed=0).double()
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.arange(3)
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    for name in (names[0], names[len(names) // 2], names[-1]):
        wanted = by_autograd(model, images, labels, [name], 2, 1)
        for layout in (torch.contiguous_format, torch.channels_last):
            model = model.to(memory_format=layout)
            given = images.contiguous(memory_format=layout)
            generator = torch.Generator().manual_seed(1)
            found = hessian_traces(
                model, [(given, labels)], layers=[name], probes=2, generator=generator, signs_in="weights"
            )
            torch.testing.assert_close(found.values, wanted)


def exact_traces(model: nn.Module, images: Tensor, labels: Tensor, names: list[str]) -> Tensor:
    model = copy.deepcopy(model).eval()
    found = []
    for name in names:
        weight = model.get_submodule(name).weight
        loss = functional.cross_entropy(model(images), labels)
        units = torch.eye(weight.numel(), dtype=weight.dtype).view(-1, *weight.shape)
        found.append(torch.cat(list(hutchinson(loss, [weight], [[unit] for unit in units]))).sum())
    return torch.stack(found)


def test_all_layers_at_once_have_the_exact_traces_on_average_and_less_noise_than_plain_products():
    model, (images, labels) = odd(), batch()
    names = ["first", "twice", "head"]
    found = hessian_traces(model, [(images, labels)], probes=2000, generator=torch.Generator().manual_seed(0))
    wanted = exact_traces(model, images, labels, names)
    assert bool(((found.mean - wanted).abs() < 4 * found.error).all())
    plain = by_autograd(model, images, labels, names, 300, 0)
    assert bool((found.values.std(dim=0) < 1.1 * plain.std(dim=0)).all())
    assert float(found.values[:, 2].std()) < 0.8 * float(plain[:, 2].std())


def test_all_sign_patterns_together_give_the_exact_trace_and_fisher_information():
    """The last layer's weights: the mean over all 2^6 probes, and all 2^4 mixtures of losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    images, labels = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    patterns = iter([torch.tensor(p, dtype=torch.float64).view(3, 2) for p in itertools.product((-1, 1), repeat=6)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainables.curvature.signs_like", lambda x, generator: next(patterns))
        traces = hessian_traces(model, [(images, labels)], probes=64, signs_in="weights")
    weight = model[0].weight
    hessian = torch.autograd.functional.hessian(
        lambda w: functional.cross_entropy(images @ w.T, labels), weight.detach()
    )
    assert float(traces.mean) == pytest.approx(float(hessian.reshape(6, 6).trace()))
    patterns = iter([torch.tensor(p, dtype=torch.float64) for p in itertools.product((-1, 1), repeat=4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainables.curvature.signs_like", lambda x, generator: next(patterns))
        fisher = fisher_traces(model, [(images, labels)], probes=16)
    squares = []
    for x, y in zip(images, labels, strict=True):
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x[None]), y[None]), weight)
        squares.append(gradient.square().sum())
    assert float(fisher.mean) == pytest.approx(float(torch.stack(squares).mean()))


def relu_net() -> nn.Module:
    """Piecewise linear in each layer: a sum, a maximum, an average, a leaky and a learned slope."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.prelu = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.PReLU(3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.max_pool2d(torch.cat([self.prelu(self.conv(x)) * 0.5 + x, 1 - x], dim=1), 2)

    torch.manual_seed(1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LeakyReLU(), nn.Linear(6, 3))
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU6(), Block(), *head).double().eval()


def test_all_signs_in_the_outputs_together_give_the_exact_traces_of_every_layer():
    model, (images, labels) = relu_net(), batch(count=2)
    patterns = [torch.tensor(p, dtype=torch.float64).view(2, 3) for p in itertools.product((-1, 1), repeat=6)]
    given = iter(patterns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainables.curvature.signs_like", lambda x, generator: next(given))
        found = hessian_traces(model, [(images, labels)], probes=len(patterns))
    assert found.layers == ("0", "3.conv", "7")
    torch.testing.assert_close(found.mean, exact_traces(model, images, labels, list(found.layers)))


def test_signs_in_the_outputs_scatter_less_in_convolutions():
    model, given = relu_net(), batch(count=16)
    spread = {
        way: hessian_traces(
            model, [given], probes=200, generator=torch.Generator().manual_seed(0), signs_in=way
        ).values.std(dim=0)
        for way in ("outputs", "weights")
    }
    assert bool((spread["outputs"] < 0.8 * spread["weights"])[:2].all())


@pytest.mark.parametrize(
    ("smooth", "what"),
    [
        (nn.GELU(), "a smooth activation"),
        (nn.Softmax(dim=1), "a quotient of two values that depend on a layer"),
        (nn.Sigmoid(), "a sigmoid"),
    ],
)
def test_signs_are_in_the_weights_where_the_outputs_would_miss_a_part(smooth, what):
    model, given = nn.Sequential(nn.Conv2d(2, 4, 3), smooth, nn.Flatten(), nn.LazyLinear(3)).double(), batch()
    model(given[0])
    assert not linear_by_layer(model, given[0])
    auto, weights = (
        hessian_traces(model, [given], probes=2, generator=torch.Generator().manual_seed(0), signs_in=way).values
        for way in ("auto", "weights")
    )
    assert torch.equal(auto, weights)
    with pytest.raises(ConfigError, match="signs_in = outputs: the network is not linear_by_layer; give weights"):
        hessian_traces(model, [given], probes=2, signs_in="outputs")


def test_a_layer_that_runs_twice_or_feeds_a_product_with_itself_is_not_linear():
    class Twice(nn.Module):
        def __init__(self, join) -> None:
            super().__init__()
            self.layer, self.join = nn.Linear(3, 3), join

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.layer, x)

    x = torch.randn(2, 3)
    assert linear_by_layer(Twice(lambda layer, x: layer(x) * x), x)
    assert not linear_by_layer(Twice(lambda layer, x: layer(layer(x))), x)
    assert not linear_by_layer(Twice(lambda layer, x: layer(x) * (y := x) * layer.forward(y)), x)
    assert not linear_by_layer(Twice(lambda layer, x: (z := layer(x)) * z), x)


def test_error_bars_cover_the_truth_and_shrink_with_more_probes():
    model, given = odd(), batch()
    few = hessian_traces(model, [given], probes=20, generator=torch.Generator().manual_seed(0))
    many = hessian_traces(model, [given], probes=500, generator=torch.Generator().manual_seed(1))
    assert bool((many.error < few.error).all())
    assert bool(((few.mean - many.mean).abs() < 4 * few.error).all())


@pytest.mark.parametrize("measure", [hessian_traces, fisher_traces])
def test_probing_stops_once_the_errors_are_small(measure):
    model, given = odd(), batch()
    found = measure(model, [given], probes=400, tolerance=0.3, generator=torch.Generator().manual_seed(0))
    assert 3 <= len(found.values) < 400
    assert found.settled(0.3)
    before = Traces(layers=found.layers, weights=found.weights, values=found.values[:-1])
    assert not before.settled(0.3)


def test_batches_are_pooled_each_with_probes_of_its_own():
    model, batches = odd(), [batch(seed=0), batch(seed=1)]
    both = hessian_traces(model, batches, probes=3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    apart = [hessian_traces(model, [each], probes=3, generator=generator) for each in batches]
    torch.testing.assert_close(both.values, pooled(apart).values)
    assert len(both.values) == 6


def test_a_single_probe_has_no_error_bar():
    found = hessian_traces(odd(), [batch()], probes=1)
    assert bool(found.error.isinf().all())
    assert not found.settled(1e9)


@pytest.mark.parametrize("measure", [hessian_traces, fisher_traces])
def test_the_network_is_left_as_it_was(measure):
    model, given = odd().train(), batch()
    before = copy.deepcopy(model.state_dict())
    measure(model, [given], probes=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.norm.training
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_quantized_layers_are_measured_by_their_float_weights():
    config = parse({"method": "float", "model": {"name": "lenet5", "width": 0.1}, "data": "digits"})
    plain = build_model(config, 5, (1, 8, 8), seed=0)
    quantized, table = copy.deepcopy(plain), trace(plain, (1, 8, 8))
    method = Method(Method.Settings())

    method.prepare(quantized, table, uniform(table, 2, 2))
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    found = [
        hessian_traces(net, [(images, labels)], probes=2, generator=torch.Generator().manual_seed(0)).values
        for net in (plain, quantized)
    ]
    torch.testing.assert_close(*found)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["first", "nowhere"]}, r"layers \['nowhere'\] are no convolutions or linear layers"),
        ({"layers": ["spare"]}, r"layers \['spare'\] do not run"),
        ({"probes": 0}, "probes = 0: give 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        hessian_traces(odd(), [batch()], **{"probes": 2, **arguments})


def test_no_batch_is_refused():
    with pytest.raises(ConfigError, match="no batch of images"):
        fisher_traces(odd(), [])


def test_traces_of_other_networks_do_not_pool():
    one, other = (Traces(layers=(name,), weights=(1,), values=torch.ones(1, 1)) for name in "ab")
    for parts in ([one, other], []):
        with pytest.raises(ValueError, match="of one network"):
            pooled(parts)


# Tables


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.integers(2, 7))
def test_a_wider_grid_never_has_a_larger_error_by_much_and_codes_are_in_range(seed, bits):
    weight = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    errors = sensitivity.quantization_errors({"w": weight}, [bits, bits + 1])["w"]
    assert errors[bits + 1] <= errors[bits] * 1.01
    assert len(sensitivity.nearest_grid(weight, bits).unique()) <= 2**bits


def test_zero_weights_have_no_error():
    assert sensitivity.quantization_errors({"w": torch.zeros(4)}, [2, 8]) == {"w": {2: 0.0, 8: 0.0}}


def test_scores_multiply_traces_and_errors_and_negative_traces_count_as_zero():
    errors = {"a": {2: 3.0, 4: 1.0}, "b": {2: 5.0, 4: 2.0}}
    scores = sensitivity.weighted({"a": 2.0, "b": -1.0}, errors)
    assert scores == {"a": {2: 6.0, 4: 2.0}, "b": {2: 0.0, 4: 0.0}}


def test_sensitivities_of_another_network_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"are of another network: they lack b and have c \(2 layers in all\)"):
        sensitivity.weighted({"a": 1.0, "c": 1.0}, {"a": {2: 1.0}, "b": {2: 1.0}})


def test_the_drop_of_each_layer_alone_is_measured_against_the_float_network():
    accuracy = {(): 0.9, (("a", 2),): 0.5, (("a", 4),): 0.8, (("b", 2),): 0.6, (("b", 4),): 0.95}
    drops = sensitivity.accuracy_drops(["a", "b"], [2, 4], lambda widths: accuracy[tuple(widths.items())])
    assert drops == {"a": pytest.approx({2: 0.4, 4: 0.1}), "b": pytest.approx({2: 0.3, 4: -0.05})}
