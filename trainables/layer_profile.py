"""What quantization does to each layer of a float network, measured: curvature, errors, and drops of accuracy.

For weights and for what each layer reads, at every width asked for:

    error    squared error of the nearest grid, summed over the weights, or over the activations of one image
    drop     of accuracy, and rise of the loss, on validation images with this alone quantized

and for each layer the average Hessian trace (HAWQ-V2), the average Fisher trace of its weights and of what it reads
(FIT, Zandonati et al. 2022, arXiv:2210.08502), all of the mean cross-entropy on training images. A trace times half the
error is the rise of the loss that a second-order expansion expects; drops are measured and need no expansion.

The work comes in parts that do not depend on one another, seeded by their numbers: `curvature_part` for each batch,
`drop_part` for each layer. Who runs them, and where, changes no number.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.config import Plugin, TrialConfig
from trainables.cost import INPUT_BITS, Layer
from trainables.fit import Session
from trainables.sensitivity import (
    Traces,
    fisher_traces,
    hessian_traces,
    nearest_grid,
    nearest_scale,
    on_grid,
    pooled,
    quantization_errors,
)
from trainables.supernet import BATCH, first_images

SAMPLED = 1 << 16
"""Activations, at most, that choose a grid and measure its error."""
ROLES = ("weight", "activation")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        widths: in bits.
        batches: of training images, for traces.
        batch_size: images of each.
        probes: random vectors of each.
        images: validation images for drops; 0 measures none.
        seed: of the probes.
    """

    widths: tuple[int, ...] = (2, 3, 4, 6, 8)
    batches: int = 4
    batch_size: int = 64
    probes: int = 10
    images: int = 512
    seed: int = 0


def float_session(
    config: TrialConfig, start: Path | None, *, data_root: Path | None = None, device: str = "cpu"
) -> Session:
    """The float network that trials of this configuration start from, in evaluation mode.

    Args:
        config: of such a trial; its method and widths play no part.
        start: float weights, as `start.float_start` gives them.
        data_root: where the data set lies.
        device: where to measure.
    """
    session = Session(
        replace(config, method=Plugin(name="float"), bits={}, training=replace(config.training, finetune_epochs=0)),
        data_root=data_root,
        start=start,
        device=device,
    )
    session.model.eval()
    return session


def curvature_part(session: Session, plan: Plan, part: int) -> dict[str, Any]:
    """Traces from one batch of training images: `part` is 0, 1, ... batches - 1.

    Returns:
        `hessian`, `fisher`: values of all probes by layer. `read`: average squared gradient of what each layer reads.
        `error`: squared error of what it reads at each width, of one image.
    """
    images, labels = (
        each[part * plan.batch_size :][: plan.batch_size]
        for each in first_images(session.data.train, (part + 1) * plan.batch_size, session.device)
    )
    names = [row.name for row in session.table.quantizable]
    generator = torch.Generator().manual_seed(plan.seed * 100_003 + part)
    options: dict[str, Any] = {"layers": names, "probes": plan.probes, "generator": generator}
    hessian = hessian_traces(session.model, [(images, labels)], **options)
    fisher = fisher_traces(session.model, [(images, labels)], **options)
    return {"hessian": hessian, "fisher": fisher, **_read(session, images, labels, plan.widths)}


def _read(session: Session, images: Tensor, labels: Tensor, widths: Sequence[int]) -> dict[str, Any]:
    """Squared gradients and quantization errors of what each layer reads; one pass for all layers.

    In evaluation mode images do not mix, so the gradient of the summed loss holds that of each image's own loss.
    """
    read: dict[str, list[Tensor]] = {}
    hooks = []
    for row in session.table.quantizable:

        def note(layer: nn.Module, args: tuple[Tensor, ...], name: str = row.name) -> tuple[Tensor, ...]:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            read.setdefault(name, []).append(x)
            return (x, *args[1:])

        hooks.append(session.model.get_submodule(row.name).register_forward_pre_hook(note))
    try:
        with torch.enable_grad():
            loss = functional.cross_entropy(session.model(images), labels, reduction="sum")
            inputs = [x for xs in read.values() for x in xs]
            gradients = dict(zip(map(id, inputs), torch.autograd.grad(loss, inputs), strict=True))
    finally:
        for hook in hooks:
            hook.remove()
    squares, errors = {}, {}
    for row in session.table.quantizable:
        xs = read.get(row.name, [])
        elements = sum(x[0].numel() for x in xs)
        total = sum(float(gradients[id(x)].double().square().sum()) for x in xs)
        squares[row.name] = total / len(images) / max(elements, 1)
        sampled = _sampled(torch.cat([x.detach().flatten() for x in xs]))
        errors[row.name] = {
            b: elements * float((nearest_grid(sampled, b, signed=row.signed) - sampled).double().square().mean())
            for b in widths
        }
    return {"read": squares, "error": errors}


def _sampled(x: Tensor) -> Tensor:
    """An evenly spaced selection."""
    return x[:: max(1, x.numel() // SAMPLED)]


def drop_part(session: Session, plan: Plan, layer: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Drop of accuracy and rise of loss with one layer quantized, by role and width.

    Activations have the grid that is nearest on a batch of training images.
    """
    images, labels = first_images(session.data.validation, plan.images, session.device)
    seen, _ = first_images(session.data.train, plan.batch_size, session.device)
    row = session.table[layer]
    module = session.model.get_submodule(layer)
    assert isinstance(module, nn.Conv2d | nn.Linear)
    accuracy, loss = _measured(session.model, images, labels)
    found: dict[str, dict[int, tuple[float, float]]] = {"weight": {}, "activation": {}}
    inputs = _inputs_of(session.model, module, seen)
    for bits in plan.widths:
        for role in ROLES:
            quantized = _weights_at(module, bits) if role == "weight" else _inputs_at(module, inputs, bits, row)
            with quantized:
                lower, higher = _measured(session.model, images, labels)
            found[role][bits] = (accuracy - lower, higher - loss)
    return found


@torch.no_grad()
def _measured(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    correct, loss = 0.0, 0.0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        logits = model(x)
        correct += float((logits.argmax(1) == y).sum())
        loss += float(functional.cross_entropy(logits, y, reduction="sum"))
    return correct / len(labels), loss / len(labels)


@torch.no_grad()
def _inputs_of(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    read: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda layer, args: read.append(args[0].flatten()))
    try:
        model(images)
    finally:
        hook.remove()
    return _sampled(torch.cat(read))


@contextmanager
def _weights_at(module: nn.Conv2d | nn.Linear, bits: int) -> Iterator[None]:
    before = module.weight.data
    module.weight.data = nearest_grid(before, bits)
    try:
        yield
    finally:
        module.weight.data = before


@contextmanager
def _inputs_at(module: nn.Module, seen: Tensor, bits: int, row: Layer) -> Iterator[None]:
    """What the layer reads on a grid; the network's input is made of 8-bit codes and is left as it is at 8 bits."""
    if row.first and bits >= INPUT_BITS:
        yield
        return
    scale = nearest_scale(seen, bits, signed=row.signed)
    hook = module.register_forward_pre_hook(
        lambda layer, args: (on_grid(args[0], scale, bits, signed=row.signed), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def rows_of(
    session: Session,
    plan: Plan,
    curvatures: Sequence[Mapping[str, Any]],
    drops: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]],
) -> list[Row]:
    """A row for each layer, from all parts.

    Args:
        session: the float network.
        plan: what was measured.
        curvatures: of `curvature_part`, in order.
        drops: of `drop_part`, by layer; empty if none were measured.
    """
    hessian, fisher = (pooled([part[name] for part in curvatures]) for name in ("hessian", "fisher"))
    parameters = dict(session.model.named_parameters())
    weights = {row.name: parameters[f"{row.name}.weight"].detach() for row in session.table.quantizable}
    errors = quantization_errors(weights, plan.widths)
    rows = []
    for row in session.table.quantizable:
        read = sum(part["read"][row.name] for part in curvatures) / len(curvatures)
        found: Row = {
            "layer": row.name,
            "weights": row.weights,
            "macs": row.macs,
            **_averages("hessian", hessian, row.name),
            **_averages("fisher", fisher, row.name),
            "fisher_read": read,
        }
        for bits in plan.widths:
            found[f"weight_error_{bits}"] = errors[row.name][bits]
            error = sum(part["error"][row.name][bits] for part in curvatures) / len(curvatures)
            found[f"activation_error_{bits}"] = error
            for role in ROLES if drops else ():
                drop, rise = drops[row.name][role][bits]
                found |= {f"{role}_drop_{bits}": drop, f"{role}_rise_{bits}": rise}
        rows.append(found)
    return rows


def _averages(name: str, traces: Traces, layer: str) -> Row:
    return {name: traces.average[layer], f"{name}_error": traces.average_error[layer]}
