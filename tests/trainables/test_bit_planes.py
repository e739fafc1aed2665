"""Tensors as bit planes: conversion, re-quantization and pruning, and the steps of their optimizer."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.trainables.bsq_cases import random, seeds, widths
from trainables.methods._binary_digits import place_values
from trainables.methods._bit_plane_sgd import BitPlaneSGD
from trainables.methods._bit_planes import BitPlanes, penalty


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
