"""Every model: its published counts, its shapes, its fields, and what it refuses."""

import functools
import importlib
import re

import pytest
import torch
from torch import nn

from trainables.cost import LayerTable
from trainables.errors import ConfigError
from trainables.layers import trace
from trainables.plugins import describe

# Each at its own input shape: MACs of one input, parameters, rows, channels of batch norm.
MODELS = {
    "lenet5": (4_267_008, 582_026, 4, 0),
    "vgg7": (615_917_568, 12_979_082, 8, 2_816),
    "resnet20": (40_813_184, 272_474, 22, 784),
    "resnet18": (1_814_073_344, 11_689_512, 21, 4_800),
    "resnet34": (3_663_761_408, 21_797_672, 37, 8_512),
    "resnet50": (4_089_184_256, 25_557_032, 54, 26_560),
    "mobilenet_v1": (568_740_352, 4_231_976, 28, 10_944),
    "mobilenet_v2": (300_774_272, 3_504_872, 53, 17_056),
}
TORCHVISION = ["resnet18", "resnet34", "resnet50", "mobilenet_v2"]
SMALL = dict.fromkeys([*TORCHVISION, "mobilenet_v1"], (3, 64, 64))


def build(name: str, classes: int, input_shape: tuple[int, int, int], **fields: object) -> nn.Module:
    return importlib.import_module(f"trainables.models.{name}").build(classes, input_shape, **fields)


@functools.cache
def table(name: str) -> LayerTable:
    module = importlib.import_module(f"trainables.models.{name}")
    return trace(build(name, module.CLASSES, module.INPUT_SHAPE), module.INPUT_SHAPE)


def macs(name: str) -> dict[str, int]:
    return {layer.name: layer.macs for layer in table(name).layers}


def test_every_listed_model_is_under_test():
    assert set(MODELS) == set(describe("trainables.models"))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_published_macs_and_each_parameter_is_counted_once(name):
    total, parameters, rows, norms = MODELS[name]
    found = table(name)
    assert (found.macs, len(found.layers), found.norm_channels, found.other_parameters) == (total, rows, norms, 0)
    assert sum(layer.weights + layer.biases for layer in found.layers) + 2 * norms == parameters


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_quantized_throughout_with_one_first_and_one_last_layer(name):
    layers = table(name).layers
    assert all(layer.quantizable and layer.macs > 0 for layer in layers)
    assert [layer.name for layer in layers if layer.first] == [layers[0].name]
    assert [layer.name for layer in layers if layer.last] == [layers[-1].name]


@pytest.mark.parametrize("name", MODELS)
def test_only_layers_behind_a_linear_bottleneck_read_negative_values(name):
    signed = {layer.name for layer in table(name).layers if layer.signed and not layer.first}
    bottlenecks = {f"features.{block}.conv.0.0" for block in range(2, 18)} | {"features.18.0"}
    assert signed == (bottlenecks if name == "mobilenet_v2" else set())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_on_its_images_and_any_number_of_classes(name):
    shape = SMALL.get(name) or importlib.import_module(f"trainables.models.{name}").INPUT_SHAPE
    model = build(name, 7, shape)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_images_of_another_depth(name):
    assert build(name, 3, (2, 32, 40)).eval()(torch.zeros(1, 2, 32, 40)).shape == (1, 3)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_repeats_its_weights_for_a_seed_and_not_its_modules(name):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = build(name, 3, (3, 32, 32))
        torch.manual_seed(3)
        second = build(name, 3, (3, 32, 32))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert not set(map(id, first.modules())) & set(map(id, second.modules()))


@pytest.mark.parametrize("name", MODELS)
def test_the_trace_leaves_every_model_as_it_was(name):
    model = build(name, 3, (3, 32, 32))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, (3, 32, 32))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_all_activations_are_relu_modules(name):
    kinds = {type(module) for module in build(name, 3, (3, 32, 32)).modules() if not list(module.children())}
    assert kinds & {nn.ReLU, nn.ReLU6}
    assert not kinds & {nn.GELU, nn.SiLU, nn.Hardswish, nn.PReLU, nn.LeakyReLU}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_says_in_one_line_what_it_is(name):
    assert re.fullmatch(r"[A-Z].{20,100}\.", describe("trainables.models")[name])


def test_lenet5_has_the_published_layers():
    assert macs("lenet5") == {"conv1": 460_800, "conv2": 3_276_800, "fc1": 524_288, "fc2": 5_120}


def test_vgg7_has_the_published_layers():
    assert list(macs("vgg7").values()) == [
        3_538_944,
        150_994_944,
        75_497_472,
        150_994_944,
        75_497_472,
        150_994_944,
        8_388_608,
        10_240,
    ]


@pytest.mark.parametrize(
    ("side", "padding", "features"),
    [(28, None, 1024), (32, None, 1600), (16, None, 64), (15, None, 576), (8, None, 256), (8, 4, 1600), (28, 2, 3136)],
)
def test_lenet5_pads_images_below_16_pixels_unless_told_otherwise(side, padding, features):
    assert build("lenet5", 10, (1, side, side), width=1.0, padding=padding).fc1.in_features == features


@pytest.mark.parametrize(("side", "channels"), [(28, 32), (16, 32), (15, 8), (8, 8)])
def test_lenet5_is_a_quarter_as_wide_for_images_below_16_pixels(side, channels):
    assert build("lenet5", 10, (1, side, side)).conv1.out_channels == channels


@pytest.mark.parametrize(("width", "channels"), [(0.25, (8, 16, 128)), (2.0, (64, 128, 1024)), (1e-9, (1, 1, 1))])
def test_lenet5_width_scales_channels_and_features(width, channels):
    model = build("lenet5", 10, (1, 28, 28), width=width)
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features) == channels
    assert (model.conv2.in_channels, model.fc2.in_features) == (channels[0], channels[2])


def test_vgg7_width_scales_channels_and_features():
    model = build("vgg7", 10, (3, 32, 32), width=0.125)
    rows = trace(model, (3, 32, 32)).layers
    assert [layer.channels for layer in rows] == [16, 16, 32, 32, 64, 64, 128, 10]


def test_mobilenet_v2_width_rounds_channels_to_multiples_of_8():
    model = build("mobilenet_v2", 10, (3, 32, 32), width=0.5)
    assert model.features[0][0].out_channels == 16
    assert trace(model, (3, 32, 32)).macs < trace(build("mobilenet_v2", 10, (3, 32, 32)), (3, 32, 32)).macs / 2


OTHERWISE_BUILT = [
    *[(name, {"kernel": 7, "width": 8}) for name in ("resnet18", "resnet20")],
    *[(name, {"kernel": 5, "width": 0.25}) for name in ("vgg7", "mobilenet_v1")],
    *[("lenet5", {"kernel": kernel, "width": 0.25}) for kernel in (3, 7)],
    ("mobilenet_v2", {"kernel": 7, "expansion": 2, "width": 0.25}),
    *[("resnet20", {"block": block, "width": 4}) for block in ("preactivation", "bottleneck", "inverted")],
    *[("resnet18", {"block": block, "depth": 10, "width": 8}) for block in ("preactivation", "bottleneck", "inverted")],
    ("resnet20", {"block": "bottleneck", "shortcut": "pad", "width": 4}),
]


@pytest.mark.parametrize(("name", "fields"), OTHERWISE_BUILT, ids=str)
def test_networks_of_other_kernels_and_blocks_train_and_every_layer_can_be_quantized(name, fields):
    shape = (1, 28, 28) if name == "lenet5" else (3, 32, 32)
    model = build(name, 7, shape, **fields)
    found = trace(model, shape)
    assert all(layer.quantizable for layer in found.layers)
    assert (
        [layer.first for layer in found.layers].count(True) == [layer.last for layer in found.layers].count(True) == 1
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.weights + layer.biases for layer in found.layers) + 2 * found.norm_channels == parameters
    model(torch.randn(2, *shape)).logsumexp(1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["vgg7", "resnet18", "resnet20", "mobilenet_v1", "mobilenet_v2"])
def test_a_larger_kernel_multiplies_the_macs_of_the_blocks_own_convolutions_alone(name):
    shape = (3, 32, 32)
    model = build(name, 10, shape)
    before = {layer.name: layer.macs for layer in trace(model, shape).layers}
    after = {layer.name: layer.macs for layer in trace(build(name, 10, shape, kernel=5), shape).layers}
    grown = {layer for layer in before if after[layer] != before[layer]}
    assert all(9 * after[layer] == 25 * before[layer] for layer in grown)
    stem = {"vgg7": ""}.get(name, next(iter(before)))
    spatial = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    assert grown == spatial - {stem}


def test_lenet5_leaves_as_many_pixels_with_larger_kernels():
    sizes = {kernel: build("lenet5", 10, (1, 28, 28), kernel=kernel).fc1.in_features for kernel in (3, 5, 7, 9)}
    assert sizes == {3: 64 * 25, 5: 1024, 7: 1024, 9: 1024}


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_our_residual_networks_have_the_layers_of_torchvisions(block):
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    theirs = ResNet(BasicBlock if block == "basic" else Bottleneck, [1, 1, 1, 1], num_classes=10)
    ours = build("resnet18", 10, (3, 64, 64), depth=10, block=block)
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert trace(ours, (3, 64, 64)).macs == trace(theirs, (3, 64, 64)).macs
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_bottlenecks_make_the_papers_resnet_164_of_1_7_million_parameters():
    model = build("resnet20", 10, (3, 32, 32), depth=110, block="bottleneck")  # 18 blocks a stage, 9n + 2 layers
    assert sum(isinstance(m, nn.Conv2d) and "downsample" not in n for n, m in model.named_modules()) == 163
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 1.7


@pytest.mark.parametrize(("depth", "rows"), [(8, 10), (20, 22), (32, 34), (56, 58)])
def test_resnet20_depth_counts_its_layers_without_the_two_shortcuts(depth, rows):
    assert len(trace(build("resnet20", 10, (3, 32, 32), depth=depth, width=4), (3, 32, 32)).layers) == rows


def test_resnet20_names_its_layers_as_torchvision_does():
    names = [layer.name for layer in table("resnet20").layers]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert names[7:10] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert names[-1] == "fc"


def test_the_zero_padded_shortcut_has_no_weights_and_passes_every_second_pixel():
    model = build("resnet20", 10, (3, 32, 32), shortcut="pad")
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722  # the paper: 0.27 M
    images = torch.randn(2, 16, 5, 5)
    shortcut = model.layer2[0].downsample(images)
    assert torch.equal(shortcut[:, 8:24], images[:, :, ::2, ::2])
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_the_cifar_stem_keeps_the_sides_and_has_no_pooling(name):
    model = build(name, 10, (1, 32, 32), stem="cifar")
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    assert model.maxpool(model.conv1(torch.zeros(1, 1, 32, 32))).shape == (1, 64, 32, 32)


def test_resnet18_for_cifar_has_the_usual_macs():
    assert trace(build("resnet18", 10, (3, 32, 32), stem="cifar"), (3, 32, 32)).macs == 555_422_720


@pytest.mark.parametrize(
    ("name", "input_shape", "fields", "message"),
    [
        ("lenet5", (1, 28, 28), {"width": 0.0}, "model/width = 0.0: lenet5 takes a factor above 0"),
        ("lenet5", (1, 28, 28), {"padding": 5}, "model/padding = 5: lenet5 takes 0..4 with model/kernel = 5"),
        ("lenet5", (1, 28, 28), {"padding": -1}, "model/padding = -1: lenet5 takes 0..4"),
        ("lenet5", (1, 28, 28), {"kernel": 4}, "model/kernel = 4: lenet5 takes an odd number of pixels"),
        ("vgg7", (3, 32, 32), {"kernel": 17}, "model/kernel = 17: vgg7 takes an odd number of pixels, 1..15"),
        ("mobilenet_v1", (3, 32, 32), {"kernel": 0}, "model/kernel = 0: mobilenet_v1"),
        ("mobilenet_v2", (3, 32, 32), {"expansion": 0}, "model/expansion = 0: mobilenet_v2 takes 1 or more"),
        ("mobilenet_v2", (3, 32, 32), {"kernel": 5, "pretrained": True}, "model/pretrained = True have kernel 3"),
        ("resnet18", (3, 32, 32), {"depth": 20}, "model/depth = 20: resnet18 takes 8n + 2, such as 10, 18, 26"),
        ("resnet18", (3, 32, 32), {"block": "plain"}, "model/block = 'plain': resnet18 takes one of basic"),
        ("resnet18", (3, 32, 32), {"width": 32, "pretrained": True}, "the weights have model/depth = 18"),
        ("resnet18", (3, 32, 32), {"width": 32, "stem": "mnist"}, "model/stem = 'mnist'"),
        ("lenet5", (1, 8, 8), {"padding": 0}, "too small for lenet5 with model/padding = 0"),
        ("lenet5", (1, 1, 1), {}, "too small for lenet5"),
        ("vgg7", (3, 32, 32), {"width": -1.0}, "model/width = -1.0: vgg7"),
        ("vgg7", (3, 32, 7), {}, "takes 8 pixels or more"),
        ("resnet20", (3, 32, 32), {"depth": 18}, "model/depth = 18: resnet20 takes 6n + 2"),
        ("resnet20", (3, 32, 32), {"depth": 2}, "model/depth = 2: resnet20 takes 6n + 2"),
        ("resnet20", (3, 32, 32), {"width": 0}, "model/width = 0"),
        ("resnet20", (3, 32, 32), {"shortcut": "none"}, "model/shortcut = 'none': resnet20 takes 'conv' or 'pad'"),
        ("resnet18", (3, 32, 32), {"stem": "mnist"}, "model/stem = 'mnist': resnet18 takes 'imagenet' or 'cifar'"),
        ("resnet50", (3, 32, 32), {"stem": "cifar", "pretrained": True}, "model/stem = 'imagenet', not of 'cifar'"),
        ("resnet34", (1, 28, 28), {"pretrained": True}, "resnet34 read 3 channels, the images have 1"),
        ("mobilenet_v2", (3, 32, 32), {"width": float("nan")}, "model/width = nan: mobilenet_v2"),
        ("mobilenet_v2", (3, 32, 32), {"width": 0.5, "pretrained": True}, "model/pretrained = True have width 1.0"),
    ],
)
def test_impossible_fields_are_refused_by_name(name, input_shape, fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(name, 10, input_shape, **fields)


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_weights_that_cannot_be_loaded_say_where_they_belong(name, content, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # where nobody listens
    if content is not None:
        store(name, tmp_path).write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"cannot load https://.*/{name}.* put that file into the folder checkpoints"
    ):
        build(name, 1000, (3, 224, 224), pretrained=True)


@pytest.mark.parametrize("classes", [1000, 10])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_pretrained_weights_are_those_of_torchvision_and_other_classes_get_a_fresh_classifier(
    name, classes, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = build(name, 1000, (3, 224, 224)).state_dict()
    torch.save(published, store(name, tmp_path))
    state = build(name, classes, (3, 224, 224), pretrained=True).state_dict()
    same = {
        key
        for key, value in state.items()
        if value.shape == published[key].shape and torch.equal(value, published[key])
    }
    classifier = {key for key in state if key.startswith(("fc.", "classifier."))}
    assert len(classifier) == 2
    assert same == (set(state) if classes == 1000 else set(state) - classifier)
    assert all(len(state[key]) == classes for key in classifier)


def store(name, folder):
    """Where torchvision looks for the weights of `name` before it downloads them."""
    from torchvision.models import get_model_weights

    path = folder / "hub" / "checkpoints" / get_model_weights(name)["IMAGENET1K_V1"].url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    return path
