"""A tensor as bit planes that are trained one by one (BSQ, Yang et al. 2021).

A tensor w is `scale * u`, and u is a weighted sum of at most eight planes, each with a positive and a negative part
(the paper's W_p and W_n, section 3.1):

    u = sum_i (positive_i - negative_i) * v_i,   v_i = 2^(planes - 1 - i) / steps,   steps = 2^planes - 1

Plane 0 is the most significant. The network computes with `scale * round(clamp(u, -1, 1) * steps) / steps`, the paper's
equation 4. Clamp and rounding pass gradients straight through, also where they saturate, so every plane's gradient is
the same tensor times a number (equation 3): only that one tensor has to go through the graph. The composed values are
therefore an ordinary parameter, the autograd leaf; `update` takes its gradient, moves the planes in closed form,
penalty included, and composes the leaf anew (`_bit_plane_sgd` does so for all tensors).

Planes beyond the present width are zero, and the width is data (`q_max` = steps): shapes never change. The sign has no
plane, so a tensor of n planes has 2^(n+1) - 1 values and is n + 1 bits wide.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainables.encoding import Encoding
from trainables.methods._binary_digits import binary, signed_place_values, used
from trainables.modules import Quantizer

MAX_PLANES = 8
LARGEST = 2.0
"""Planes are kept in 0..2 while they are trained."""
EPSILON = 1e-4
"""Its square is added inside the square root of a plane's norm: an empty plane has a gradient, 0."""


class BitPlanes(Quantizer):
    """One tensor (weights or biases) in bit representation.

    `forward` returns its argument: the leaf holds what the planes stand for already.

    Args:
        shape: of the tensor.
        planes: width without the sign, 0..8; 0 is a tensor of zeros that stays so.
        penalty: weight of the group Lasso per plane: strength x elements / all elements of the model, >= 0.

    Attributes:
        bit_planes: (8, 2, elements): plane, positive or negative part, element in the order of a contiguous tensor.
        latent: (elements), the normalized values that are trained once the width is frozen, in -1..1.
        scale: (), in the units of the tensor.
        plane_norms: (8), `sqrt(1e-8 + sum of squares)` of each plane; 0 beyond the width and once frozen.
        q_max: (), 2^planes - 1.
        frozen: whether the width is fixed and `latent` is trained in place of the planes.
        muted: whether the leaf is held at zero (a published slip, see `methods/bsq.py`).
    """

    bit_planes: Tensor
    latent: Tensor
    scale: Tensor
    plane_norms: Tensor

    def __init__(self, shape: Sequence[int], planes: int = MAX_PLANES, *, penalty: float = 0.0) -> None:
        nn.Module.__init__(self)  # the width of a new quantizer would be set before it has planes
        self.signed = self.symmetric = True
        self.shape = tuple(shape)
        self.penalty = penalty
        self.frozen = self.muted = False
        elements = torch.Size(self.shape).numel()
        self.register_buffer("q_min", torch.zeros(()))
        self.register_buffer("q_max", torch.zeros(()))
        self.register_buffer("bit_planes", torch.zeros(MAX_PLANES, 2, elements))
        self.register_buffer("latent", torch.zeros(elements))
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("plane_norms", torch.zeros(MAX_PLANES))
        self._set_planes(planes)

    # Width and values

    @property
    def planes(self) -> int:
        """Width without the sign, 0..8; reads a buffer, so not for the hot loop."""
        return int(self.q_max + 1).bit_length() - 1

    def _set_planes(self, planes: int) -> None:
        self.q_max.fill_(2**planes - 1)
        self.q_min.copy_(-self.q_max)
        self.plane_norms.zero_()

    def set_bits(self, bits: int) -> None:
        """Round the present values to `bits` with the sign (`bits - 1` planes); `compose` then tells the leaf."""
        values = self.values()
        super().set_bits(bits)
        self._convert(values)

    def forward(self, x: Tensor) -> Tensor:
        """The leaf itself."""
        return x

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Planes and sign as one code; 0 bits where all values `x` are zero."""
        assert x is not None
        if not bool(x.any()):
            return Encoding(bits=0, q_min=0, q_max=0, scale=torch.ones(()))
        steps = int(self.q_max)
        return Encoding(bits=self.planes + 1, q_min=-steps, q_max=steps, scale=self.scale.clone(), divisor=float(steps))

    def _signs(self, planes: int) -> Tensor:
        return signed_place_values(planes, self.scale.device).to(self.scale.dtype)

    def _rows(self, planes: int) -> Tensor:
        """The planes in use, as a matrix (2 x planes, elements)."""
        return self.bit_planes[:planes].view(2 * planes, self.bit_planes.shape[2])

    def normalized(self, planes: int | None = None) -> Tensor:
        """u, flat: the sum of planes in -2..2, or the latent values once frozen."""
        if self.frozen:
            return self.latent
        planes = self.planes if planes is None else planes
        return self._signs(planes) @ self._rows(planes)

    def codes(self) -> Tensor:
        """Integers in -steps..steps, flat, as floats."""
        return self.normalized().clamp(-1, 1).mul(self.q_max).round()

    def levels(self, planes: int | None = None) -> Tensor:
        """What the scale multiplies, flat: `round(clamp(u) * steps) / steps`, in -1..1."""
        planes = self.planes if planes is None else planes
        steps = 2**planes - 1
        return self.normalized(planes).clamp(-1, 1).mul_(steps).round_().div_(max(1, steps))

    def values(self) -> Tensor:
        """What the tensor stands for: scale times levels, in its shape."""
        return self.levels().mul_(self.scale).view(self.shape)

    @torch.no_grad()
    def compose(self, leaf: Tensor, planes: int | None = None) -> None:
        """Write the values into the leaf, and note the norms of the planes."""
        planes = self.planes if planes is None else planes
        if self.muted:
            leaf.zero_()
        else:
            torch.mul(self.levels(planes).view(self.shape), self.scale, out=leaf.data)
        if self.penalty and not self.frozen:
            norms = torch.linalg.vector_norm(self.bit_planes[:planes], dim=(1, 2))
            torch.hypot(norms, norms.new_tensor(EPSILON), out=self.plane_norms[:planes])

    def _trained(self, planes: int) -> Tensor:
        """What the optimizer steps on, as a matrix: the planes in use, or one row of latent values."""
        return self.latent.view(1, -1) if self.frozen else self._rows(planes)

    # From floats, and between widths

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Convert the float tensor `x` at the present width, and compose it there: `x` is the leaf."""
        self._convert(x)
        self.compose(x)

    def _convert(self, x: Tensor) -> None:
        """Section 3.1: the largest magnitude becomes the scale, and codes are written in binary."""
        x = x.detach().reshape(-1)
        self.scale.copy_(x.abs().amax() * self.q_max.clamp_max(1))
        codes = x.mul(self.q_max).div_(self.scale).nan_to_num_(0.0, 0.0, 0.0).round_()
        self._write(codes)

    def _write(self, codes: Tensor) -> None:
        planes = self.planes
        self.bit_planes.zero_()
        self.bit_planes[:planes] = binary(codes, planes)
        self.latent.copy_(codes / self.q_max.clamp_min(1))

    @torch.no_grad()
    def requantize(self) -> None:
        """Make the planes binary again; a tensor of fewer than eight planes whose u passed 1 gets one more.

        Without growth the values stay as they are. With it they change: what the forward pass cut off is kept.
        """
        planes = self.planes
        codes = self.normalized(planes).mul(self.q_max).round_()
        if planes < MAX_PLANES and bool((codes.abs() > self.q_max).any()) and planes:
            self._set_planes(planes + 1)
            self.scale.mul_((2 ** (planes + 1) - 1) / (2**planes - 1))
        self._write(codes.clamp_(self.q_min, self.q_max))

    @torch.no_grad()
    def prune(self, threshold: float = 0.0, *, as_published: bool = False) -> None:
        """Drop leading and trailing planes that hardly any element uses; at least one stays.

        A plane dropped at the top while elements use it is folded: those elements get all remaining bits. A plane
        dropped at the bottom doubles the scale's unit.

        Args:
            threshold: percent of elements, 0..100; 0 drops empty planes only and leaves the values as they are.
            as_published: fold as the authors' code does, which forgets all but the last of several folded planes.
        """
        before = self.planes
        planes = self.bit_planes[:before]
        entry, shares = planes, used(planes)
        while len(planes) > 1:
            first = before - len(planes)
            share = shares[first] if as_published else used(planes[:1])[0]
            if share > 0 and share >= threshold:
                break
            whole = entry[first:] if as_published and share > 0 else planes
            planes = (whole[1:] + whole[:1]).clamp_max(1)
        top_dropped = before - len(planes)
        shares = used(planes)
        while len(planes) > 1 and shares[len(planes) - 1] <= threshold:
            planes = planes[:-1]
        bottom_dropped = before - top_dropped - len(planes)
        after = len(planes)
        kept = planes.clone()
        self.bit_planes.zero_()[:after] = kept
        self._set_planes(after)
        self.scale.mul_(2**bottom_dropped * (2**after - 1) / (2**before - 1) if before else 1)
        self.latent.copy_(self._signs(after) @ self._rows(after))

    @torch.no_grad()
    def adjust(self, leaf: Tensor, threshold: float = 0.0, *, as_published: bool = False) -> None:
        """Section 3.3: re-quantize, then drop what is not needed any more."""
        self.requantize()
        self.prune(threshold, as_published=as_published)
        self.compose(leaf)

    @torch.no_grad()
    def freeze(self, leaf: Tensor, *, mute: bool = False) -> None:
        """Fix the width; from here the normalized values are trained, and a tensor of zeros stays one (0 planes)."""
        if not self.frozen:
            self.latent.copy_(self.normalized())
            if not bool(self.latent.any()):
                self._set_planes(0)
            self.plane_norms.zero_()
            self.frozen, self.muted = True, mute
        self.compose(leaf)

    # What it looks like

    def shares(self) -> list[float]:
        """Percent of elements with a one in each bit of their codes, most significant first; none at 0 planes."""
        planes = self.planes
        return [float(share) for share in used(binary(self.codes(), planes))]

    def binary_planes(self) -> tuple[Tensor, Tensor]:
        """Positive and negative planes of the codes, 0 or 1, (*shape, planes); one empty plane at 0 planes."""
        planes = max(1, self.planes)
        bits = binary(self.codes(), planes)
        positive, negative = bits[:, 0], bits[:, 1]
        return positive.T.reshape(*self.shape, planes), negative.T.reshape(*self.shape, planes)

    # Training

    @torch.no_grad()
    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients that the closed-form update stands for, given the leaf's.

        Args:
            grad: gradient of the task loss for the leaf, in its shape (the paper's dL/dW_q).

        Returns:
            For the planes, (planes, 2, elements), penalty included, or for the latent values once frozen (elements);
            and for the scale, ().
        """
        planes = self.planes
        flat = grad.reshape(-1)
        for_scale = (flat * self.levels()).sum()
        if self.frozen:
            return flat * self.scale, for_scale
        data = torch.outer(self._signs(planes), flat * self.scale).view(planes, 2, flat.numel())
        return data + self.bit_planes[:planes] * self._decay(planes, 0.0).view(-1, 1, 1), for_scale

    def _decay(self, planes: int, weight_decay: float) -> Tensor:
        """What multiplies each plane in its own gradient: weight decay, and the group Lasso's `1 / norm`."""
        if not self.penalty:
            return self.plane_norms.new_full((planes,), weight_decay)
        return self.penalty * planes / self.plane_norms[:planes] + weight_decay

    @torch.no_grad()
    def update(
        self, leaf: Tensor, state: dict[str, Any], *, planes: int, lr: float, momentum: float, weight_decay: float
    ) -> None:
        """One step of SGD on planes (or latent values) and scale, from the gradient of the leaf; composes the leaf.

        Args:
            leaf: with its gradient.
            state: keeps the momenta.
            planes: the present width.
            lr, momentum, weight_decay: as in `torch.optim.SGD`.
        """
        grad, velocity = leaf.grad, state["momentum"]
        assert grad is not None
        along = (leaf.detach() * grad).sum() / self.scale  # the leaf is scale times what the scale multiplies
        for_scale = torch.add(along.nan_to_num_(0.0), self.scale, alpha=weight_decay)
        rows = self._trained(planes)
        if self.frozen:
            velocity.addr_(self.scale.view(1), grad.reshape(-1), beta=momentum).add_(rows, alpha=weight_decay)
            rows.sub_(velocity, alpha=lr).clamp_(-1, 1)
        else:
            velocity.addr_(self._signs(planes) * self.scale, grad.reshape(-1), beta=momentum)
            decay = self._decay(planes, weight_decay).view(-1, 1, 1)
            velocity.view(planes, 2, -1).addcmul_(self.bit_planes[:planes], decay)
            rows.sub_(velocity, alpha=lr).clamp_(0, LARGEST)
        state["scale_momentum"].mul_(momentum).add_(for_scale)
        self.scale.sub_(state["scale_momentum"], alpha=lr)
        self.compose(leaf, planes)


def penalty(tensors: Iterable[BitPlanes]) -> Tensor:
    """The reweighed group Lasso (equation 5) as a number without a graph; its gradient is part of the update."""
    found = [tensor for tensor in tensors if tensor.penalty and not tensor.frozen]
    if not found:
        return torch.zeros(())
    widths = torch.stack([tensor.q_max for tensor in found]).add_(1).log2_()
    norms = torch.stack([tensor.plane_norms for tensor in found]).sum(dim=1)
    return (norms * widths * norms.new_tensor([tensor.penalty for tensor in found])).sum()


def bit_tensors(model: nn.Module) -> Iterator[tuple[str, str, BitPlanes, nn.Parameter]]:
    """Layer, role (`weight` or `bias`), planes and leaf of every tensor in bit representation."""
    for path, module in model.named_modules():
        if isinstance(module, BitPlanes):
            layer, _, name = path.rpartition(".")
            role = name.removesuffix("_quantizer")
            yield layer, role, module, model.get_parameter(f"{layer}.{role}" if layer else role)
