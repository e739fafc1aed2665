"""Mixtures of a supernet's widths: shared prefixes change no bit, recalibration, the stored form, what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainables import checkpoint
from trainables.config import parse
from trainables.errors import ConfigError
from trainables.fit import Session
from trainables.method import Choices
from trainables.modules import NormSets, quantized_layers
from trainables.prefix import Kept, Prefixes, recalibrate, steps_of
from trainables.supernet import Supernet, bits_of, fix, keep, opened

RESNET = {"name": "resnet20", "depth": 8, "width": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "double_rounding lenet5": {"method": {"name": "double_rounding"}, "model": {"name": "lenet5"}},
    "double_rounding resnet20": {"method": {"name": "double_rounding", "widths": "8,4,3"}, "model": RESNET},
    "double_rounding mixed": {"method": {"name": "double_rounding", "precision": "mixed"}, "model": RESNET},
    "adabits resnet20": {"method": {"name": "adabits", "widths": "8,4,2", "ends_bits": 4}, "model": RESNET},
    "adabits shared norms": {"method": {"name": "adabits", "norms": "shared"}, "model": RESNET},
}
NORMED = [name for name in NETWORKS if "lenet5" not in name]
every_network = pytest.mark.parametrize("name", NETWORKS)
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
CALIBRATION = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(2))
_sessions: dict[str, Session] = {}


class Detour(nn.Module):
    """A network whose forward goes by values, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x))
        y = torch.relu(self.conv2(y)) if float(y.detach().sum()) >= 0 else y
        return self.fc(y.flatten(1))


def detour(classes: int) -> nn.Module:
    return Detour()


def session(name: str) -> Session:
    """A network whose batch norms all differ, as after a training; calibrated, never trained."""
    if name not in _sessions:
        data = {"name": "digits", "train_limit": 64, "validation_limit": 40}
        made = Session(parse({**NETWORKS[name], "data": data}))
        made.calibrate()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, value in made.model.state_dict().items():
                if "running_" in key or ("bn" in key and value.is_floating_point()):
                    value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
                if key.endswith("num_batches_tracked"):
                    value.fill_(1)
        made.model.eval()
        _sessions[name] = made
    return _sessions[name]


def mixtures(name: str) -> st.SearchStrategy[dict[str, list[int]]]:
    """Widths of every layer, from those that it was trained at."""
    net = session(name)
    choices = net.method.choices(net.model)
    return st.fixed_dictionaries(
        {layer: st.tuples(st.sampled_from(c.weight), st.sampled_from(c.activation)) for layer, c in choices.items()}
    ).map(lambda widths: {layer: list(pair) for layer, pair in widths.items()})


@torch.no_grad()
def plain(name: str, widths: dict[str, list[int]], calibration: Tensor | None) -> Tensor:
    """Logits of the network switched and run as a whole."""
    net = session(name)
    model = net.model if calibration is None else copy.deepcopy(net.model)
    net.method.mixture(model, bits_of(widths)).activate()
    if calibration is not None:
        recalibrate(model, calibration)
    logits: Tensor = model(IMAGES)
    return logits


@every_network
@pytest.mark.parametrize("calibrated", [False, True])
@given(data=st.data())
@settings(deadline=None, max_examples=5, suppress_health_check=list(HealthCheck))
def test_mixtures_that_share_their_prefixes_have_the_logits_of_a_plain_evaluation_bit_for_bit(
    name: str, calibrated: bool, data: st.DataObject
) -> None:
    if calibrated and name not in NORMED:
        return
    net = session(name)
    calibration = CALIBRATION if calibrated else None
    most_bytes = data.draw(st.sampled_from([0, 20_000, 1 << 30]))
    choices = net.method.choices(net.model)
    shared = Prefixes(net.model, choices, [IMAGES], calibration, most_bytes=most_bytes)
    for widths in data.draw(st.lists(mixtures(name), min_size=2, max_size=5)):
        bits = bits_of(widths)
        net.method.mixture(net.model, bits).activate()
        assert torch.equal(shared.logits(bits, 0), plain(name, widths, calibration))
    assert shared.kept.bytes <= most_bytes


def test_a_network_that_no_graph_can_follow_is_evaluated_as_a_whole() -> None:
    NETWORKS["detour"] = {"method": {"name": "double_rounding"}, "model": {"name": f"{__name__}:detour"}}
    try:
        net = session("detour")
    finally:
        del NETWORKS["detour"]
    shared = Prefixes(net.model, net.method.choices(net.model), [IMAGES], most_bytes=1 << 30)
    assert len(shared.steps.all) == 2
    for width in (8, 2, 8):
        widths = {"conv1": [8, 8], "conv2": [width, 4], "fc": [8, 8]}
        net.method.mixture(net.model, bits_of(widths)).activate()
        assert torch.equal(shared.logits(bits_of(widths), 0), plain("detour", widths, None))


def test_what_does_not_change_runs_once_and_what_comes_after_it_again() -> None:
    net = session("double_rounding lenet5")
    runs: dict[str, int] = {}
    shared = Prefixes(net.model, net.method.choices(net.model), [IMAGES], most_bytes=1 << 30)
    for number, step in enumerate(shared.steps.all):
        step.run = lambda *args, number=number, run=step.run: (
            runs.__setitem__(number, runs.get(number, 0) + 1),
            run(*args),
        )[1]
    for w2, a2, w3 in ((4, 4, 4), (4, 4, 2), (4, 2, 2), (2, 4, 4)):
        bits = bits_of({"conv1": [8, 8], "conv2": [w2, a2], "fc1": [w3, 8], "fc2": [8, 8]})
        net.method.mixture(net.model, bits).activate()
        shared.logits(bits, 0)
    counts = [runs.get(number, 0) for number in range(1, len(shared.steps.all))]
    assert counts[:3] == [1, 1, 1]  # conv1 with its ReLU and pooling, whatever follows
    assert counts[3] == 2  # the codes of conv2's input, at 4 and at 2 bits
    assert counts[4] == 3  # conv2, at three pairs of widths
    assert counts[-1] == 4  # the last layer


def test_only_values_that_a_mixture_may_start_from_are_kept() -> None:
    net = session("double_rounding lenet5")
    steps = steps_of(net.model, net.method.choices(net.model)).all
    assert sum(step.keep for step in steps) == 4  # inputs of conv2 and fc1, and their codes
    alone = {name: Choices(weight=(8,), activation=(8,)) for name, _ in quantized_layers(net.model)}
    assert not any(step.keep for step in steps_of(net.model, alone).all)


@given(sizes=st.lists(st.integers(0, 9), max_size=30), most=st.integers(0, 20))
def test_what_is_kept_never_exceeds_its_limit_and_the_latest_stay(sizes: list[int], most: int) -> None:
    kept = Kept(most * 4)
    for number, size in enumerate(sizes):
        kept.put(number, torch.zeros(size))
        assert kept.bytes <= most * 4
    have = [number for number in range(len(sizes)) if kept.get(number) is not None]
    assert have == list(range(len(sizes) - len(have), len(sizes)))
    assert kept.bytes == 4 * sum(sizes[number] for number in have)


@every_network
def test_a_mixture_of_one_width_is_the_networks_own_point_of_that_width(name: str) -> None:
    net = session(name)
    for point in net.method.points(net.model):
        point.activate()
        with torch.no_grad():
            wanted = net.model(IMAGES)
        mixed = net.method.mixture(net.model, point.bits)
        mixed.activate()
        with torch.no_grad():
            assert torch.equal(net.model(IMAGES), wanted)
        assert (mixed.bits, mixed.extra_floats) == (point.bits, point.extra_floats)


@pytest.mark.parametrize("name", NORMED)
def test_recalibrated_norms_hand_on_what_is_normal_on_the_calibration_images(name: str) -> None:
    net = copy.deepcopy(session(name))
    before = {key: value.clone() for key, value in net.model.state_dict().items() if "running_" not in key}
    recalibrate(net.model, CALIBRATION)
    first = next(m for m in net.model.modules() if isinstance(m, NormSets))
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        net.model(CALIBRATION)
        out = first.normalised(seen[0], *_statistics_in_use(first))
        ours = first(seen[0])
    assert torch.equal(out, ours)
    mean, var = _statistics_in_use(first)
    torch.testing.assert_close(mean, seen[0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(var, seen[0].var(dim=(0, 2, 3)))
    after = net.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def _statistics_in_use(norm: Any) -> tuple[Tensor, Tensor]:
    if hasattr(norm, "sets"):
        return norm.plain().running_mean, norm.plain().running_var
    return norm.running_mean[norm.used], norm.running_var[norm.used]


@every_network
def test_a_kept_network_comes_back_with_all_its_mixtures(name: str, tmp_path: Path) -> None:
    net = session(name)
    keep(net, tmp_path / "supernet.safetensors")
    tensors, _ = checkpoint.read(tmp_path / "supernet.safetensors")
    if name.startswith("double"):
        weights = {f"{layer}.weight" for layer, _ in quantized_layers(net.model)}
        assert not weights & set(tensors)
        assert all(tensors[f"{layer}.codes"].dtype == torch.int8 for layer, _ in quantized_layers(net.model))
    again = opened(tmp_path / "supernet.safetensors")
    widths = {layer: [c.weight[-1], c.activation[0]] for layer, c in again.method.choices(again.model).items()}
    again.method.mixture(again.model, bits_of(widths)).activate()
    with torch.no_grad():
        assert torch.equal(again.model(IMAGES), plain(name, widths, None))


@pytest.mark.parametrize("name", ["double_rounding lenet5", "double_rounding mixed"])
def test_a_measured_mixture_is_what_the_fixed_network_reaches(name: str, tmp_path: Path) -> None:
    net = session(name)
    calibration = 16 if name in NORMED else 0
    shared = Supernet(net, calibration=calibration)
    widths = {layer: [c.weight[-1], c.activation[-1]] for layer, c in shared.choices.items()}
    wide = {layer: [c.weight[0], c.activation[0]] for layer, c in shared.choices.items()}
    found = shared.measure([widths, wide, widths])
    assert found[0] == found[2]
    keep(net, tmp_path / "net.safetensors")
    alone = opened(tmp_path / "net.safetensors")
    fix(alone, widths, calibration=calibration)
    (report,) = alone.measure(alone.data.validation)
    assert report.accuracy == found[0].accuracy
    assert report.loss == pytest.approx(found[0].loss, rel=1e-5)
    assert report.bits == widths


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"method": {"name": "lsq"}, "model": {"name": "lenet5"}},
            "'lsq' trains a network of fixed widths, no supernet",
        ),
        (
            {"method": {"name": "double_rounding", "widths": "4"}, "model": {"name": "lenet5"}},
            "was trained at one width for each layer and has nothing to switch",
        ),
    ],
)
def test_a_network_that_does_not_switch_is_no_supernet(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    net = Session(parse({**config, "data": {"name": "digits", "train_limit": 64, "validation_limit": 40}}))
    with pytest.raises(ConfigError, match=message):
        Supernet(net)
    with pytest.raises(ConfigError, match=message):
        keep(net, tmp_path / "net.safetensors")


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    net = session("double_rounding lenet5")
    with pytest.raises(ConfigError, match="recalibration has no effect: the network has no batch norm"):
        Supernet(net, calibration=64)
    with pytest.raises(ConfigError, match=r"images = 41: the validation split has 1\.\.40"):
        Supernet(net, images=41)
    with pytest.raises(ConfigError, match="calibration = 1: give 2 images or more"):
        Supernet(session("double_rounding mixed"), calibration=1)
    with pytest.raises(ConfigError, match=r"bits/conv2/weight = 5: the network is trained at 8, 6, 4, 2"):
        Supernet(net).measure([{"conv1": [8, 8], "conv2": [5, 8], "fc1": [8, 8], "fc2": [8, 8]}])
    checkpoint.write(tmp_path / "other.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(ConfigError, match="holds no supernet"):
        opened(tmp_path / "other.safetensors")
