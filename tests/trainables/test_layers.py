"""Laws of the traced layer table: exact counts, whoever multiplies, and a model that does not notice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.cost import LayerTable
from trainables.errors import ConfigError
from trainables.layers import trace

SIDE = 9


def stored(table: LayerTable) -> int:
    """Parameters of a whole table."""
    rows = sum(layer.weights + layer.biases for layer in table.layers)
    return rows + 2 * table.norm_channels + table.other_parameters


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_two_rows_describe_a_convolution_and_a_linear_layer_completely():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)
    )
    conv, linear = trace(model, (3, SIDE, SIDE)).layers
    assert (conv.name, conv.kind, conv.macs, conv.weights, conv.biases, conv.channels) == (
        "0",
        "conv",
        10584,
        216,
        0,
        8,
    )
    assert (conv.first, conv.last, conv.signed, conv.quantizable) == (True, False, True, True)
    assert (linear.name, linear.kind, linear.macs, linear.weights, linear.biases) == ("4", "linear", 3920, 3920, 10)
    assert (linear.channels, linear.first, linear.last, linear.signed, linear.quantizable) == (
        10,
        False,
        True,
        False,
        True,
    )


@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_a_convolution_has_outputs_times_kernel_macs(groups, inputs, outputs, kernel, stride, dilation, padding):
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    conv = nn.Conv2d(groups * inputs, groups * outputs, kernel, groups=groups, **options)
    side = (SIDE + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    table = trace(nn.Sequential(conv), (groups * inputs, SIDE, SIDE))
    assert table.macs == groups * outputs * side**2 * inputs * kernel**2


@given(groups=st.integers(2, 5), multiplier=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_grouping_divides_macs_and_weights_and_depthwise_is_one_channel_each(groups, multiplier):
    channels = groups * multiplier
    dense, grouped, depthwise = (
        trace(nn.Sequential(nn.Conv2d(channels, channels, 3, groups=count)), (channels, SIDE, SIDE)).layers[0]
        for count in (1, groups, channels)
    )
    assert (grouped.macs * groups, grouped.weights * groups) == (dense.macs, dense.weights)
    assert (depthwise.macs * channels, depthwise.weights * channels) == (dense.macs, dense.weights)


@given(
    groups=st.integers(1, 2),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_a_transposed_convolution_applies_its_kernel_once_an_input(groups, inputs, outputs, kernel, stride):
    conv = nn.ConvTranspose2d(groups * inputs, groups * outputs, kernel, stride=stride, groups=groups)
    (row,) = trace(nn.Sequential(conv), (groups * inputs, SIDE, SIDE)).layers
    assert row.macs == SIDE**2 * groups * inputs * outputs * kernel**2
    assert (row.kind, row.quantizable, row.channels, row.weights) == (
        "matmul",
        False,
        groups * outputs,
        conv.weight.numel(),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("flat_from", "macs"), [(1, 90 * 7), (2, 2 * 45 * 7), (3, 2 * 5 * 9 * 7)])
def test_a_linear_layer_counts_every_leading_dimension(bias, flat_from, macs):
    features = {1: 90, 2: 45, 3: 9}[flat_from]
    table = trace(nn.Sequential(nn.Flatten(flat_from), nn.Linear(features, 7, bias=bias)), (2, 5, 9))
    assert (table.macs, table.layers[0].biases) == (macs, 7 * bias)


def test_a_layer_that_reads_a_transposed_tensor_counts_the_same():
    class Transposed(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.transpose(2, 3))

    assert trace(nn.Sequential(Transposed(5, 7)), (2, 5, 9)).macs == 2 * 9 * 5 * 7


def test_a_shared_layer_is_one_row_with_the_macs_of_all_its_calls():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    once = trace(nn.Sequential(shared), (4, SIDE, SIDE))
    twice = trace(nn.Sequential(shared, nn.ReLU(), shared), (4, SIDE, SIDE))
    assert [layer.name for layer in twice.layers] == ["0"]
    assert twice.macs == 2 * once.macs
    assert stored(twice) == stored(once) == parameters(shared)


@pytest.mark.parametrize("signed_call", [0, 1])
def test_a_shared_layer_is_signed_when_one_of_its_calls_reads_negative_values(signed_call):
    shared = nn.Conv2d(4, 4, 3, padding=1)
    before = [nn.ReLU(), nn.ReLU()]
    before[signed_call] = nn.BatchNorm2d(4)
    assert trace(nn.Sequential(before[0], shared, before[1], shared), (4, SIDE, SIDE)).layers[0].signed


def test_a_shared_layer_is_first_when_its_first_call_reads_the_input():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    (row,) = trace(nn.Sequential(shared, nn.ReLU(), shared), (4, SIDE, SIDE)).layers
    assert (row.first, row.last) == (True, True)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images) + self.shortcut(images)


def test_both_branches_of_a_residual_block_read_the_input_and_the_one_that_runs_last_is_last():
    table = trace(Residual(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 1)), (3, SIDE, SIDE))
    assert [(layer.name, layer.first, layer.last) for layer in table.layers] == [
        ("body", True, False),
        ("shortcut", True, True),
    ]
    assert table.macs == SIDE**2 * 15 * (9 + 1)


def test_a_view_of_the_input_is_the_input_and_a_copy_is_not():
    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images / 2

    assert trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)).layers[0].first
    assert not trace(nn.Sequential(Half(), nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)).layers[0].first


class Functional(nn.Module):
    """A product of images with a parameter of its own, and one of two activations."""

    def __init__(self, inference: bool):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(7, 5))
        self.inference = inference

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(self.inference):
            features = F.linear(images.mean(1), self.kernel)  # (batch, 4, 7)
            return torch.matmul(features, features.transpose(1, 2))  # (batch, 4, 4)


@pytest.mark.parametrize("inference", [False, True])
def test_functional_products_are_a_matmul_row_of_the_module_that_makes_them(inference):
    table = trace(nn.Sequential(nn.ReLU(), Functional(inference)), (3, 4, 5))
    (row,) = table.layers
    assert (row.name, row.kind, row.quantizable) == ("1", "matmul", False)
    assert (row.macs, row.weights, row.biases) == (4 * 7 * 5 + 4 * 4 * 7, 35, 0)
    assert (row.signed, row.first, row.last) == (True, False, True)
    assert table.other_parameters == 0


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_counts_projections_scores_and_values(need_weights, bias):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            tokens = images.flatten(2)
            return self.attention(tokens, tokens, tokens, need_weights=need_weights)[0]

    model = Attention()
    table = trace(model, (6, 2, 4))
    (row,) = table.layers
    assert (row.name, row.macs) == ("attention", 4 * 6 * 8 * 8 + 2 * 6 * 6 * 8)
    assert (row.kind, row.quantizable, row.weights, row.channels) == ("matmul", False, 4 * 64, 8)
    assert stored(table) == parameters(model)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("depth", [4, 6])
def test_fused_attention_counts_as_the_two_products_inside(mask, depth):
    class Attention(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            keys = images[:, :, :3]  # 5 queries, 3 keys
            bias = images.new_zeros(5, 3) if mask else None
            return F.scaled_dot_product_attention(images, keys, keys[..., :depth], attn_mask=bias)

    (row,) = trace(Attention(), (2, 5, 6)).layers
    assert (row.name, row.kind, row.macs) == ("", "matmul", 2 * 5 * 3 * (6 + depth))


@pytest.mark.parametrize(("cell", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_count_both_products_of_every_gate_and_step(cell, gates):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(6, 7, batch_first=True, bidirectional=True)

        def forward(self, images: Tensor) -> Tensor:
            return self.cell(images.flatten(1, 2))[0]

    model = Rows()
    table = trace(model, (1, 5, 6))
    assert table.macs == 2 * gates * 5 * 7 * (6 + 7)
    assert [(layer.name, layer.kind) for layer in table.layers] == [("cell", "matmul")]
    assert stored(table) == parameters(model)


class LoudConv(nn.Conv2d):
    """A layer of one's own: whatever it multiplies inside is its own row."""

    def __init__(self) -> None:
        super().__init__(3, 4, 1)
        self.gain = nn.Parameter(torch.ones(4, 4))

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", super().forward(input), self.gain)


def test_products_inside_a_subclass_belong_to_its_row_and_its_other_parameters_to_none():
    table = trace(nn.Sequential(LoudConv()), (3, 2, 2))
    (row,) = table.layers
    assert (row.kind, row.quantizable, row.macs) == ("conv", True, 4 * (3 * 4 + 4 * 4))
    assert (row.weights, row.biases, table.other_parameters) == (12, 4, 16)


def test_a_layer_inside_a_layer_has_its_own_row():
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.adapter = nn.Linear(6, 2)

        def forward(self, input: Tensor) -> Tensor:
            return F.pad(self.adapter(input), (0, 4)) + super().forward(input)

    table = trace(nn.Sequential(nn.Flatten(), Adapted()), (6, 1, 1))
    assert {layer.name: layer.macs for layer in table.layers} == {"1": 36, "1.adapter": 12}


def test_a_layer_that_runs_without_multiplying_is_no_row():
    class Off(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    table = trace(nn.Sequential(Off(3, 3, 1), nn.Conv2d(3, 2, 1)), (3, 2, 2))
    assert [layer.name for layer in table.layers] == ["1"]
    assert table.other_parameters == 12


def test_layers_that_never_run_are_no_rows_and_their_parameters_are_others():
    model = Residual(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 1))
    model.unused = nn.Linear(10, 10)
    table = trace(model, (3, SIDE, SIDE))
    assert [layer.name for layer in table.layers] == ["body", "shortcut"]
    assert table.other_parameters == 110


def test_a_fresh_batch_norm_makes_signed_and_an_activation_unsigned_tensors():
    norm, after_norm, after_relu = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    norm.running_mean.fill_(-100.0)  # with these statistics nothing would be negative
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, after_norm, nn.ReLU(inplace=True), after_relu, nn.Sigmoid())
    table = trace(model, (3, SIDE, SIDE))
    assert [layer.signed for layer in table.layers] == [True, True, False]
    assert table.norm_channels == 4


@pytest.mark.parametrize("channels", [1, 4])
def test_parameters_outside_of_layers_and_batch_norms_are_others(channels):
    model = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.GroupNorm(2, 4), nn.PReLU(4), nn.BatchNorm2d(4, affine=False))
    table = trace(model, (channels, 3, 3))
    assert (table.norm_channels, table.other_parameters) == (4, 8 + 4)


class Noisy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(images + torch.randn_like(images), 0.5, training=True)


def test_the_trace_leaves_modes_buffers_parameters_gradients_and_random_generators_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Noisy(), nn.Dropout(), nn.Conv2d(4, 4, 1))
    model[1].eval()
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random = torch.get_rng_state()
    trace(model, (3, SIDE, SIDE))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), gradients, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_tracing_twice_gives_the_same_table():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    assert trace(model, (3, SIDE, SIDE)) == trace(model, (3, SIDE, SIDE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_trace_runs_in_the_models_own_type(dtype):
    assert trace(nn.Sequential(nn.Conv2d(3, 4, 3)).to(dtype), (3, 3, 3)).macs == 108


def test_a_model_without_products_has_an_empty_table():
    assert trace(nn.ReLU(), (1, 2, 2)) == LayerTable(layers=())


def test_a_product_that_cannot_be_counted_is_an_error_that_names_its_module():
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.Bilinear(4, 4, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.pairs(images.flatten(1), images.flatten(1))

    with pytest.raises(ConfigError, match=r"module 'pairs' runs '_trilinear'"):
        trace(Pairs(), (1, 2, 2))


def test_macs_that_do_not_depend_on_the_input_are_an_error():
    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.randn(4, 3))
            self.right = nn.Parameter(torch.randn(3, 4))

        def forward(self, images: Tensor) -> Tensor:
            return F.linear(images.flatten(1), self.left @ self.right)

    with pytest.raises(ConfigError, match="do not depend on the input"):
        trace(nn.Sequential(Factored()), (1, 2, 2))


def test_vit_b_16_at_224_is_exact_with_its_attention():
    from torchvision.models import vit_b_16

    table = trace(vit_b_16(), (3, 224, 224))
    patches, depth, hidden, blocks, classes = 14 * 14, 768, 3072, 12, 1000
    tokens = patches + 1  # and one class token
    stem = patches * depth * 3 * 16 * 16
    projections = blocks * tokens * 4 * depth * depth  # query, key, value, out: weights called functionally
    mlp = blocks * tokens * 2 * depth * hidden
    attention = blocks * 2 * tokens * tokens * depth  # scores, and their product with the values, all heads
    head = depth * classes
    assert stem + projections + mlp + head == 16_848_500_736
    assert attention == 715_327_488
    assert table.macs == 17_563_828_224
    assert sum(layer.macs for layer in table.layers if layer.kind == "matmul") == projections + attention
    assert stored(table) == 86_567_656
