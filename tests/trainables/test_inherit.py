"""Inherited weights: nothing of a parent is lost where shapes allow, and a larger network begins as its parent."""

import importlib
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainables.inherit import Inherited, inherit

INPUTS = {"resnet20": (3, 12, 12), "lenet5": (1, 16, 16), "vgg7": (3, 8, 8), "mobilenet_v2": (3, 32, 32)}
BASE = {
    "resnet20": {"depth": 14, "width": 4},
    "lenet5": {"width": 0.125, "padding": 2},
    "vgg7": {"width": 0.0625},
    "mobilenet_v2": {"width": 0.25},
}


def build(name: str, seed: int = 0, side: int = 0, /, **fields: object) -> nn.Module:
    torch.manual_seed(seed)
    channels, *sides = INPUTS[name]
    shape = (channels, *([side, side] if side else sides))
    model = importlib.import_module(f"trainables.models.{name}").build(10, shape, **BASE[name] | fields)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):  # as a training leaves them
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def child(parent: nn.Module, name: str, /, **fields: object) -> tuple[nn.Module, Inherited]:
    model = build(name, 1, **fields)
    return model, inherit(model, parent.state_dict())


def answers(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(4, *INPUTS[name], generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", BASE)
def test_the_same_network_takes_over_everything(name):
    parent = build(name)
    twin, counts = child(parent, name)
    assert torch.equal(answers(twin, name), answers(parent, name))
    assert (counts.part, counts.fresh) == (0, 0)
    assert counts.whole == sum(value.dim() > 0 for value in parent.state_dict().values())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet20", {"width": 6}),
        ("resnet20", {"kernel": 5}),
        ("resnet20", {"width": 5, "kernel": 7}),
        ("lenet5", {"width": 0.25}),
        ("lenet5", {"kernel": 7, "padding": 3}),
        ("lenet5", {"width": 0.2, "kernel": 9, "padding": 4}),
        ("vgg7", {"width": 0.125, "kernel": 5}),
        ("mobilenet_v2", {"width": 0.5, "kernel": 5}),
    ],
)
def test_a_wider_network_or_one_of_larger_kernels_begins_as_its_parent(name, fields):
    parent = build(name)
    larger, counts = child(parent, name, **fields)
    torch.testing.assert_close(answers(larger, name), answers(parent, name), rtol=1e-4, atol=1e-4)
    assert counts.fresh == 0
    assert counts.part > 0


def test_a_narrower_network_has_its_parents_first_channels_and_the_middle_of_its_kernels():
    parent = build("resnet20", kernel=5)
    narrow, _ = child(parent, "resnet20", width=3)
    old, new = parent.state_dict(), narrow.state_dict()
    assert torch.equal(new["layer2.0.conv1.weight"], old["layer2.0.conv1.weight"][:6, :3, 1:4, 1:4])
    assert torch.equal(new["layer2.0.bn1.running_var"], old["layer2.0.bn1.running_var"][:6])
    assert torch.equal(new["fc.weight"], old["fc.weight"][:, :12])
    assert torch.equal(new["fc.bias"], old["fc.bias"])


def test_features_that_are_flattened_keep_their_channel():
    parent = build("lenet5")
    narrow, _ = child(parent, "lenet5", width=0.0625)
    assert torch.equal(narrow.fc1.weight, parent.fc1.weight[:32, : 4 * 16])


def test_a_deeper_network_has_fresh_blocks_behind_its_parents():
    parent = build("resnet20")
    deep, counts = child(parent, "resnet20", depth=20)
    assert all(torch.equal(deep.state_dict()[name], value) for name, value in parent.state_dict().items())
    assert (counts.part, counts.fresh) == (0, 3 * 10)  # two convolutions and two norms of four tensors a block


def test_other_blocks_share_the_stem_and_the_convolutions_that_are_of_the_same_kind():
    fresh = build("resnet20", 1, block="bottleneck").state_dict()
    other, counts = child(build("resnet20"), "resnet20", block="bottleneck")
    inherited = {n for n, value in other.state_dict().items() if value.dim() and not torch.equal(value, fresh[n])}
    layers = {name.rpartition(".")[0] for name in inherited}
    assert {name.rpartition(".")[2] for name in layers} == {"conv1", "bn1", "conv2", "bn2", "0", "1"}
    assert {name for name in layers if name.endswith(("conv1", "bn1"))} == {"conv1", "bn1"}  # none of 1 x 1
    assert len(inherited) == counts.whole + counts.part


def test_at_another_resolution_only_layers_that_read_flattened_pixels_are_fresh():
    lenet = build("lenet5", 1, 20)
    counts = inherit(lenet, build("lenet5").state_dict())
    assert counts == Inherited(whole=6, part=0, fresh=2)
    assert torch.equal(lenet.conv2.weight, build("lenet5").conv2.weight)
    resnet = build("resnet20", 1, 24)
    assert inherit(resnet, build("resnet20").state_dict()).fresh == 0


@settings(deadline=None, max_examples=25)
@given(
    here=st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([3, 5, 7])),
    there=st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([3, 5, 7])),
)
def test_a_convolution_takes_what_it_has_in_common_and_zeros_around_it(here, there):
    def conv(size: tuple[int, int, int]) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(size[0], size[1], size[2], bias=False))

    old, new = conv(there), conv(here)
    before, own = new[0].weight.clone(), new[0].weight
    inherit(new, old.state_dict())
    margin = (here[2] - there[2]) // 2
    for o, i, y, x in product(range(here[1]), range(here[0]), range(here[2]), range(here[2])):
        place = (o, i, y - margin, x - margin)
        if o >= there[1]:
            assert own[o, i, y, x] == before[o, i, y, x]
        elif all(0 <= p < n for p, n in zip(place, old[0].weight.shape, strict=True)):
            assert own[o, i, y, x] == old[0].weight[place]
        else:
            assert own[o, i, y, x] == 0
