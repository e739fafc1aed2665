"""How a network's loss depends on its bits, from what trials returned: sensitivities, corrected as results come in.

Rounding noise quarters with each bit, so a quality y (lower is better: loss, or 1 - accuracy) is modelled as

    y = a + c log(e0 + sum_j s_j 4^-b_j exp(d_j x_j + steep x_j + bend x_j^2 / 4))  +  r(b),    x_j = b_j - 5

with a sensitivity s_j > 0 for each bit parameter. With a large e0 this is a sum of independent losses, with a small one
their logarithm, between them it saturates as accuracy does. Where noise does not quarter, steep and bend say how it
falls for all parameters, and d_j for one. The s_j have a lognormal prior around what is known before training, the d_j
a normal one around 0, of widths that the results decide (marginal likelihood): sensitivities that fit are kept, wrong
ones are forgotten, and the d_j stay 0 where nothing speaks for them. The maximum of the posterior is found by
Gauss-Newton steps; its curvature gives samples for Thompson sampling. r is a Gaussian process over the widths, for what
no sum can say: interactions of layers.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from threadpoolctl import ThreadpoolController

LOG4 = np.log(4.0)
PRIORS = ((0.03, 0.0), (0.1, 0.0), (0.3, 0.0), (1.0, 0.0), (2.0, 0.0), (0.1, 0.3), (1.0, 0.3))
"""Widths of the priors of log s and of d that the results choose from."""
NOISE = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Standard deviations of what the sum leaves unexplained, as shares of that of all results."""
GLOBAL = 5
"""Parameters before the sensitivities: a, log c, log e0, steep, bend."""
SHAPE = (0.3, 0.2)
"""Widths of the priors of steep and bend."""
MIDDLE = 5.0
"""Bits at which a parameter's noise is s_j 4^-b_j."""
STEPS, CHOOSING = 6, 2
"""Gauss-Newton steps at most, and those of them that choose prior width and noise anew."""
LENGTHS = (2.0, 4.0)
"""Length scales of the residual, in bits (Euclidean distance over all parameters)."""
NUGGETS = (1e-2, 0.1, 0.5, 2.0)
"""Variances of independent noise, as shares of the residual's smooth variance."""
FEWEST_RESIDUALS, JUDGED, MOST_RESIDUALS = 4, 96, 256
"""Trials for which r is 0; the last trials, by which length and noise are chosen; those that r goes through."""
FLOOR, TINY = 1e-9, 1e-12

one_thread = ThreadpoolController().wrap(limits=1, user_api="blas")
"""Decorates what works on small matrices: threads take many times as long for them, and their number changes the last
digits, so that the same sweep would propose otherwise on a machine with more cores."""


@dataclass(frozen=True, kw_only=True)
class LossModel:
    """A fitted model.

    Attributes:
        values: a, log c, log e0, steep, bend, all log s and all d, (5 + 2 x parameters,).
        root: square root of the posterior covariance, (5 + 2 x parameters, same).
        trust: chosen width of the prior of log s.
        known: widths at which the residual is conditioned, (k, parameters).
        pull: weights of the kernel at each of them, (k,).
        length: length scale of the kernel in bits.
    """

    values: np.ndarray
    root: np.ndarray
    trust: float
    known: np.ndarray
    pull: np.ndarray
    length: float = 1.0

    @property
    def sensitivities(self) -> np.ndarray:
        """Of each bit parameter, up to a common factor."""
        return np.exp(self.values[GLOBAL:].reshape(2, -1)[0])

    def noise(self, widths: np.ndarray) -> np.ndarray:
        """What each parameter adds to the sum at each of its widths, (parameters, widths)."""
        return _terms(self.values, widths.T).T

    def predict(self, bits: np.ndarray) -> np.ndarray:
        """Predicted quality of each row of widths, (n,)."""
        return self.curve(bits) + self.residual(bits)

    def curve(self, bits: np.ndarray) -> np.ndarray:
        """The part that is a sum over parameters, (n,)."""
        return _curve(self.values, bits)

    def residual(self, bits: np.ndarray) -> np.ndarray:
        """r of each row of widths, (n,)."""
        return _kernel(bits, self.known, self.length) @ self.pull if len(self.known) else np.zeros(len(bits))

    def sample(self, generator: np.random.Generator) -> "LossModel":
        """The same with sensitivities drawn from their posterior."""
        drawn = self.root @ generator.standard_normal(len(self.values))
        return replace(self, values=self.values + np.clip(drawn, -3, 3))


@one_thread
def fit(bits: np.ndarray, quality: np.ndarray, prior: np.ndarray) -> LossModel:
    """Fit to results.

    Args:
        bits: widths of each trial, (n, parameters), n >= 1.
        quality: what was measured, lower is better, finite, (n,).
        prior: guessed sensitivities up to a common factor, > 0, (parameters,).
    """
    spread = max(float(quality.std()), FLOOR)
    centre = _start(bits, quality, np.log(prior), spread)
    posterior = _Posterior(spread=spread)
    values, cost = centre, np.inf
    for step in range(STEPS):
        predicted, slopes = _curve(values, bits), _slopes(values, bits)
        target = quality - predicted + slopes @ (values - centre)  # of the linearised model, from the prior's centre
        posterior = posterior.updated(slopes, target, choose=step < CHOOSING)
        move = centre + posterior.mean - values
        before = posterior.objective(values - centre, quality - predicted)
        for shrink in (1.0, 0.5, 0.25, 0.1):
            moved = values + shrink * move
            after = posterior.objective(moved - centre, quality - _curve(moved, bits))
            if after < before:
                values = moved
                break
        if step >= CHOOSING and abs(cost - after) < 1e-3 * max(1.0, abs(after)):
            break
        cost = after
    known, pull, length = _residual(bits, quality - _curve(values, bits), spread)
    return LossModel(
        values=values, root=posterior.root, trust=posterior.prior[0], known=known, pull=pull, length=length
    )


def guess(prior: np.ndarray) -> LossModel:
    """What is believed before any result: the prior's sensitivities, and a loss that is the logarithm of their sum."""
    none = np.zeros(len(prior))
    values = np.concatenate([[0.0, 0.0, np.log(FLOOR * prior.sum()), 0.0, 0.0], np.log(prior), none])
    root = np.diag(np.concatenate([np.zeros(GLOBAL), np.ones(len(prior)), none]))
    return LossModel(values=values, root=root, trust=1.0, known=np.zeros((0, len(prior))), pull=np.zeros(0))


def _curve(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The formula without r, (n,)."""
    return values[0] + np.exp(values[1]) * np.log(np.exp(values[2]) + _terms(values, bits).sum(axis=1))


def _slopes(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Its derivatives by all values, (n, 5 + 2 x parameters)."""
    terms = _terms(values, bits)
    floor, scale = np.exp(values[2]), np.exp(values[1])
    total = floor + terms.sum(axis=1)
    by_s = scale * terms / total[:, None]
    by_d = by_s * (bits - MIDDLE)
    by_bend = (by_d * (bits - MIDDLE)).sum(axis=1) / 4
    rest = [np.ones(len(bits)), scale * np.log(total), scale * floor / total, by_d.sum(axis=1), by_bend]
    return np.column_stack([*rest, by_s, by_d])


def _terms(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """What each parameter adds to the sum, (n, parameters)."""
    steep, bend = values[GLOBAL - 2 : GLOBAL]
    logs, decays = values[GLOBAL:].reshape(2, -1)
    off = bits - MIDDLE
    return np.exp(logs - LOG4 * bits + (steep + decays) * off + bend / 4 * off**2)


def _start(bits: np.ndarray, quality: np.ndarray, prior: np.ndarray, spread: float) -> np.ndarray:
    """The best a and c for each of several e0, with the prior's sensitivities scaled to a typical sum of 1."""
    sums = np.exp(prior - LOG4 * bits).sum(axis=1)
    middle = float(np.exp(np.log(sums).mean()))
    best, error = np.zeros(0), np.inf
    for floor in (1e-3, 0.1, 1.0, 10.0):
        logs = np.log(floor + sums / middle)
        centred = logs - logs.mean()
        variance = float(centred @ centred)
        slope = max(float(centred @ quality) / variance if variance > FLOOR else spread, 0.05 * spread)
        offset = float(quality.mean() - slope * logs.mean())
        misfit = float(((quality - offset - slope * logs) ** 2).sum())
        if misfit < error:
            start = [offset, np.log(slope), np.log(floor), 0.0, 0.0]
            best, error = np.concatenate([start, prior - np.log(middle), np.zeros(len(prior))]), misfit
    return best


@dataclass(frozen=True, kw_only=True)
class _Posterior:
    """Of the linearised model: prior width and noise with the largest marginal likelihood, and what follows.

    Attributes:
        spread: standard deviation of the results.
        prior, noise: as chosen.
        mean: from the prior's centre.
        root: square root of the covariance.
    """

    spread: float
    prior: tuple[float, float] = PRIORS[0]
    noise: float = 1.0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    root: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def updated(self, slopes: np.ndarray, target: np.ndarray, *, choose: bool) -> "_Posterior":
        priors = PRIORS if choose else (self.prior,)
        widths = np.stack([self.widths(prior, slopes.shape[1]) for prior in priors])
        eigen, basis = _spectrum(slopes * widths[:, None, :])
        turned = np.einsum("tpk,tp->tk", basis, widths * (slopes.T @ target))
        noises = self.spread * np.array(NOISE)
        variance = noises[:, None] ** 2
        shrunk = eigen[:, None, :] / variance + 1  # (priors, noises, parameters)
        misfit = float(target @ target) / noises**2 - ((turned[:, None, :] / variance) ** 2 / shrunk).sum(axis=2)
        evidence = -0.5 * (misfit + len(target) * np.log(noises**2) + np.log(shrunk).sum(axis=2))
        t, k = np.unravel_index(int(evidence.argmax()), evidence.shape)
        mean = widths[t] * (basis[t] @ (turned[t] / variance[k] / shrunk[t, k]))
        narrowed = (basis[t] * (1 / np.sqrt(shrunk[t, k]) - 1)) @ basis[t].T
        root = widths[t][:, None] * (np.eye(len(narrowed)) + narrowed)
        return replace(self, prior=priors[t], noise=float(noises[k]), mean=mean, root=root)

    def widths(self, prior: tuple[float, float], count: int) -> np.ndarray:
        return np.concatenate([[10 * self.spread, 1.0, 3.0, *SHAPE], np.repeat(prior, (count - GLOBAL) // 2)])

    def objective(self, off: np.ndarray, misfit: np.ndarray) -> float:
        """Twice the negative logarithm of the posterior, up to a constant."""
        widths = self.widths(self.prior, len(off))
        off = off / np.where(widths > 0, widths, 1.0)  # of width 0, nothing is off
        return float(misfit @ misfit) / self.noise**2 + float(off @ off)


def _spectrum(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, (m, k), and eigenvectors, (m, p, k), of the squares of m matrices with n rows, (m, n, p).

    They come from the smaller of both squares: k is the lesser of n and p. Where an eigenvalue is 0, so is its vector.
    """
    turned = rows.transpose(0, 2, 1)
    if rows.shape[1] >= rows.shape[2]:
        eigen, basis = np.linalg.eigh(turned @ rows)
        return np.maximum(eigen, 0.0), basis
    eigen, left = np.linalg.eigh(rows @ turned)
    eigen = np.where(eigen > TINY * eigen[:, -1:], eigen, 0.0)
    return eigen, turned @ (left / np.where(eigen > 0, np.sqrt(eigen), np.inf)[:, None, :])


def _residual(bits: np.ndarray, residual: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A Gaussian process through what the sum leaves, by marginal likelihood; empty if there is next to nothing."""
    if len(residual) < FEWEST_RESIDUALS or residual.std() < 1e-3 * spread:
        return bits[:0], residual[:0], 1.0
    known, wanted = bits[-JUDGED:], residual[-JUDGED:]
    best, length, nugget = -np.inf, LENGTHS[0], NUGGETS[-1]
    for tried in LENGTHS:
        eigen, basis = np.linalg.eigh(_kernel(known, known, tried))
        turned = basis.T @ wanted
        for share in NUGGETS:
            shrunk = np.maximum(eigen, 0.0) + share
            scale = float((turned**2 / shrunk).mean())
            evidence = -0.5 * (len(turned) * np.log(scale) + float(np.log(shrunk).sum()))
            if evidence > best:
                best, length, nugget = evidence, tried, share
    known, wanted = bits[-MOST_RESIDUALS:], residual[-MOST_RESIDUALS:]
    covariance = _kernel(known, known, length) + nugget * np.eye(len(known))
    return known, np.linalg.solve(covariance, wanted), length


def _kernel(left: np.ndarray, right: np.ndarray, length: float) -> np.ndarray:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    return np.exp(-np.maximum(squares, 0.0) / (2 * length**2))
