"""What a supernet adds to Double Rounding: transitional batch norms, adaptive rates, draws of widths, mixtures."""

import pytest
import torch
from torch import Tensor, nn

from tests.trainables.switched_networks import RESNET, WIDTHS, config, prepared
from trainables.build import layer_table
from trainables.cost import LayerBits
from trainables.errors import ConfigError
from trainables.methods._adaptive_rates import ShortenedStep
from trainables.methods._bit_switching import draw_widths, roulette, switch_probabilities
from trainables.methods._switched_norm import SwitchedNorm, record_order, switch_norms
from trainables.methods._switched_quantizers import quantizers


class Block(nn.Module):
    """A stem, two layers beside a shortcut, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.short, self.short_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)  # defined first, run last
        self.a, self.a_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.b, self.b_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        y = self.b_norm(self.b(self.a_norm(self.a(x)).relu()))
        return self.head((y + self.short_norm(self.short(x))).relu().mean(dim=(2, 3)))


def test_each_norm_knows_the_layers_around_it_and_a_shortcut_stands_beside_the_first_layer():
    model = Block()
    switch_norms(model, WIDTHS, pairs=True)
    order = record_order(model, [model.short, model.a, model.b], torch.randn(2, 1, 4, 4))
    assert order == [(2, 0), (0, 0), (1, 1)]
    found = {name: module.order.tolist() for name, module in model.named_modules() if isinstance(module, SwitchedNorm)}
    assert found == {"stem_norm": [-1, -1], "a_norm": [-1, 0], "b_norm": [0, 1], "short_norm": [-1, 2]}


@pytest.mark.parametrize(("pairs", "count"), [(False, 4), (True, 16)])
def test_the_state_of_a_plain_norm_loads_into_every_set(pairs, count):
    plain = nn.BatchNorm2d(3)
    plain.weight.data.uniform_()
    plain.running_mean.uniform_()
    norm = SwitchedNorm(nn.BatchNorm2d(3), WIDTHS, pairs=pairs)
    norm.load_state_dict(plain.state_dict())
    assert len(norm.sets) == count
    for each in norm.sets.values():
        assert torch.equal(each.weight, plain.weight)
        assert torch.equal(each.running_mean, plain.running_mean)


def test_transitions_start_from_the_set_of_the_width_that_they_lead_to():
    norm = SwitchedNorm(nn.BatchNorm2d(1), (8, 2), pairs=True)
    for value, name in enumerate(norm.sets):
        norm.sets[name].weight.data.fill_(value)
    norm.spread((8, 2))
    weights_by_key = {name: float(each.weight) for name, each in norm.sets.items()}
    assert weights_by_key == {"8_8": 0.0, "8_2": 3.0, "2_8": 0.0, "2_2": 3.0}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_shortened_step_is_that_of_a_lower_learning_rate(kind):
    found = []
    for lr, rate in ((0.1, 0.25), (0.025, 1.0)):
        scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = kind([scale], lr=lr)
        for gradient in ([0.3, -4.0], [1.0, 0.5]):
            step = ShortenedStep([[scale]], clipped=False)
            scale.grad = torch.tensor(gradient, dtype=torch.float64)
            optimizer.step()
            step.finish(lambda mean, rate=rate: [rate])
        found.append(scale.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("clipped", "gradient", "mean"), [(True, 1.0, 1.0), (False, 5.0, 0.0)])
def test_a_step_that_is_measured_clips_gradients(clipped, gradient, mean):
    scale = nn.Parameter(torch.tensor(1.0))
    step = ShortenedStep([[scale]], clipped=clipped)
    (5 * scale).backward()
    step.clip()
    assert float(scale.grad) == gradient
    seen = []
    step.finish(lambda mean: seen.append(mean) or [1.0])
    assert seen == [mean]


def test_the_roulette_returns_the_ends_for_the_ends():
    chances = switch_probabilities(torch.tensor([True, False]), [2, 4, 6, 8])
    assert roulette(chances, torch.tensor([0.0, 0.0])).tolist() == [0, 0]
    assert roulette(chances * (1 - 1e-9), torch.tensor([1.0, 1.0])).tolist() == [3, 3]


def test_draws_follow_their_probabilities_and_the_seed():
    chances = switch_probabilities(torch.tensor([True] * 4000), [2, 6])
    torch.manual_seed(1)
    drawn = draw_widths(chances, [2, 6], outer=2, rate=0.5)
    torch.manual_seed(1)
    assert drawn == draw_widths(chances, [2, 6], outer=2, rate=0.5)
    assert drawn.count(6) / 4000 == pytest.approx(0.5 * 0.75, abs=0.03)


def test_a_supernet_takes_any_mixture_of_its_widths_and_its_norms_follow():
    method, model, _ = prepared(precision="mixed")
    bits = dict(method.points(model)[0].bits)
    bits["layer1.0.conv1"] = LayerBits(weight=4, activation=6)
    bits["layer1.0.conv2"] = LayerBits(weight=2, activation=2)
    method.switch(model, bits)
    used = {name: module.used for name, module in model.named_modules() if isinstance(module, SwitchedNorm)}
    assert used["bn1"] == "4_4"  # before the first switched layer, by its width
    assert used["layer1.0.bn1"] == "4_4"
    assert used["layer1.0.bn2"] == "4_2"
    assert used["layer2.0.bn1"] == "2_8"
    assert model.get_submodule("layer1.0.conv1").input_quantizer.bits == 6


@pytest.mark.parametrize(
    ("layer", "width", "message"),
    [
        (
            "layer1.0.conv1",
            LayerBits(weight=3, activation=8),
            r"layer1.0.conv1/weight = 3: the network is trained at 8, 6",
        ),
        (
            "layer1.0.conv1",
            LayerBits(weight=8, activation=5),
            r"layer1.0.conv1/activation = 5: the network is trained at",
        ),
        ("fc", LayerBits(weight=4, activation=8), r"fc/weight = 4: the network is trained at 8;"),
        ("nowhere", LayerBits(weight=4, activation=4), r"bits of \['nowhere'\] are missing or of no quantized layer"),
    ],
)
def test_a_supernet_refuses_what_it_was_not_trained_at_and_stays_as_it_was(layer, width, message):
    method, model, _ = prepared(precision="mixed")
    method.switch(model, 6)
    with pytest.raises(ConfigError, match=message):
        method.switch(model, {**method.points(model)[0].bits, layer: width})
    assert model.get_submodule("layer1.0.conv1").weight_quantizer.bits == 6


def test_an_untrained_width_for_all_layers_is_refused():
    method, model, _ = prepared()
    with pytest.raises(ConfigError, match="= 5: the network is trained at 8, 6, 4, 2"):
        method.switch(model, 5)


def test_layers_draw_widths_once_switching_begins_and_a_shortcut_goes_with_its_block():
    method, model, _ = prepared(precision="mixed", probes=3, warmup=0.0, switch_rate=1.0)
    model.train()
    method.after_epoch(model, 1)  # the last epoch has the full rate
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    seen = set()
    torch.manual_seed(0)
    for loss in method.losses(model, images, labels):
        widths = {name: weights.bits for name, weights, _ in quantizers(model)}
        assert widths["layer2.0.downsample.0"] == widths["layer2.0.conv1"]
        assert widths["conv1"] == widths["fc"] == 8
        seen |= set(widths.values())
        loss.backward()
        method.after_step(model)
    assert len(seen) > 2
    assert all(bool(weights.trace.isfinite()) for _, weights, _ in quantizers(model) if not weights.is_end)


def test_given_traces_are_taken_and_decide_who_draws_high_widths():
    names = [row.name for row in layer_table(config(RESNET)).quantizable if not (row.first or row.last)]
    traces = {name: float(i) for i, name in enumerate(names)}
    _, model, _ = prepared(precision="mixed", traces=traces)
    assert {name: float(w.trace) for name, w, _ in quantizers(model) if not w.is_end} == traces
