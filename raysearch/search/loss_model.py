"""How a network's loss depends on its bits, from what trials returned: sensitivities, corrected as results come in.

The model is the formula of `loss_formula` plus r(b), a Gaussian process over the widths, for what no sum can
say: interactions of layers. The s_j have a lognormal prior around what is known before training, lines and walks a
normal one around 0, of widths that the results decide (marginal likelihood): sensitivities that fit are kept, wrong
ones are forgotten, and the own_j stay 0 where nothing speaks for them. The maximum of the posterior is found by
Gauss-Newton steps (Levenberg 1944), its curvature gives samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from threadpoolctl import ThreadpoolController

from raysearch.search.loss_formula import LOG4, MIDDLE, OUTER, Curve, Formula

PRIORS = (
    (0.03, 0.0, 0.0),
    (0.1, 0.0, 0.0),
    (0.3, 0.0, 0.0),
    (1.0, 0.0, 0.0),
    (2.0, 0.0, 0.0),
    (0.1, 0.3, 0.0),
    (1.0, 0.3, 0.0),
    (0.3, 0.0, 1.0),
    (1.0, 0.0, 1.0),
)
"""Widths of the priors of log s, of own lines' slopes and of own walks' steps, of which the results choose."""
NOISE = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Standard deviations of what the sum leaves unexplained, as shares of that of all results."""
FLOORS, CEILINGS, SLOPES = np.array([1e-3, 0.1, 1.0, 10.0]), np.array([1e-3, 0.1, 1.0]), np.array([0.0, 0.7, 1.2])
"""e0, e1 and slopes of the shape from which the fit may start, where a typical sum is 1."""
STEPS, CHOSEN = 9, (0, 3)
"""Gauss-Newton steps at most, and those of them that choose prior widths and noise anew."""
UNSETTLED = 0.3
"""Noise of a step at least, as a share of the misfit before it: far from the optimum, the linearised model is wrong."""
TRIES, SETTLED = 5, 0.5
"""Dampings of a step that are tried until it is an improvement, and how small an improvement is the last."""
LENGTHS = (2.0, 4.0)
"""Length scales of the residual, in bits (Euclidean distance over all parameters)."""
NUGGETS = (1e-2, 0.1, 0.5, 2.0)
"""Variances of independent noise, as shares of the residual's smooth variance."""
WEIGHED = 64
"""The last trials, by which prior widths and noise are chosen."""
FEWEST_RESIDUALS, JUDGED, MOST_RESIDUALS = 4, 96, 256
"""Trials for which r is 0; the last trials, by which length and noise are chosen; those that r goes through."""
FLOOR = 1e-9

one_thread = ThreadpoolController().wrap(limits=1, user_api="blas")
"""Decorates what works on small matrices: threads take many times as long for them, and their number changes the last
digits, so that the same sweep would propose otherwise on a machine with more cores."""


@dataclass(frozen=True, kw_only=True)
class LossModel:
    """A fitted model.

    Attributes:
        formula: what the values mean.
        values: as the formula says.
        trust: chosen width of the prior of log s.
        priors: chosen widths of the priors of all values.
        rows: the linearised model's slopes at the results, times the priors above 0, over the noise, (n, those).
        known: widths at which the residual is conditioned, (k, parameters).
        pull: weights of the kernel at each of them, (k,).
        length: length scale of the kernel in bits.
    """

    formula: Formula
    values: np.ndarray
    trust: float
    priors: np.ndarray
    rows: np.ndarray
    known: np.ndarray
    pull: np.ndarray
    length: float = 1.0

    @property
    def sensitivities(self) -> np.ndarray:
        """Of each bit parameter, up to a common factor."""
        return 4.0**MIDDLE * self._table(int(MIDDLE))[:, -1]

    def noise(self, widths: np.ndarray) -> np.ndarray:
        """What each parameter adds to the sum at each of its widths, (parameters, widths)."""
        return np.take_along_axis(self._table(int(widths.max())), widths.astype(int), axis=1)

    def predict(self, bits: np.ndarray) -> np.ndarray:
        """Predicted quality of each row of widths, (n,)."""
        return self.curve(bits) + self.residual(bits)

    def curve(self, bits: np.ndarray) -> np.ndarray:
        """The part that is a sum over parameters, (n,)."""
        table = self._table(int(bits.max(initial=1.0)))
        places = bits.astype(np.intp) + table.shape[1] * np.arange(len(table))
        return Curve(self.values, table.ravel().take(places)).heights

    def residual(self, bits: np.ndarray) -> np.ndarray:
        """r of each row of widths, (n,)."""
        return _kernel(bits, self.known, self.length) @ self.pull if len(self.known) else np.zeros(len(bits))

    def sample(self, generator: np.random.Generator) -> "LossModel":
        """The same with values drawn from their posterior (Matheron's rule: a draw of the prior, corrected)."""
        free = np.flatnonzero(self.priors)
        drawn = generator.standard_normal(len(free))
        wrong = self.rows @ drawn + generator.standard_normal(len(self.rows))
        values = self.values.copy()
        values[free] += np.clip(self.priors[free] * (drawn - _Ridge(self.rows).solved(self.rows.T @ wrong)), -3, 3)
        return replace(self, values=values)

    def _table(self, widest: int) -> np.ndarray:
        """What each parameter adds to the sum at each width 0, 1, ..., (parameters, widths)."""
        widths = np.arange(widest + 1.0)
        return self.formula.noise(self.values, widths, self.formula.features(widths))


@one_thread
def fit(bits: np.ndarray, quality: np.ndarray, prior: np.ndarray, kinds: Sequence[int] | None = None) -> LossModel:
    """Fit to results.

    Args:
        bits: widths of each trial, (n, parameters), n >= 1.
        quality: what was measured, lower is better, finite, (n,).
        prior: guessed sensitivities up to a common factor, > 0, (parameters,).
        kinds: parameters of one kind may all be more sensitive than guessed; by default all are of one.
    """
    results = _Results(bits, quality, [0] * len(prior) if kinds is None else kinds)
    optima = [_climbed(results, start) for start in _starts(results, np.log(prior))]
    best = min(optima, key=lambda optimum: optimum.surprise)
    known, pull, length = _residual(bits, quality - best.curve.heights, results.spread)
    return LossModel(
        formula=results.formula,
        values=best.curve.values,
        trust=best.own[0],
        priors=results.formula.priors(results.spread, best.own),
        rows=best.rows,
        known=known,
        pull=pull,
        length=length,
    )


class _Results:
    """What was measured, and the features of its widths."""

    def __init__(self, bits: np.ndarray, quality: np.ndarray, kinds: Sequence[int]) -> None:
        self.bits, self.quality = bits, quality
        self.spread = max(float(quality.std()), FLOOR)
        self.widths, places = np.unique(bits, return_inverse=True)
        self.formula = Formula.of(kinds, self.widths)
        self.table = self.formula.features(self.widths)
        self.features = self.table[places.reshape(bits.shape)].transpose(0, 2, 1)
        self.where = np.arange(bits.shape[1]), places.reshape(bits.shape)

    def curve(self, values: np.ndarray) -> Curve:
        """At the results' widths."""
        return Curve(values, self.formula.noise(values, self.widths, self.table)[self.where])


@dataclass(frozen=True, kw_only=True)
class _Optimum:
    """Where Gauss-Newton steps from one start have ended.

    Attributes:
        curve: there.
        own: as chosen from `PRIORS`.
        rows: as in `LossModel`.
        surprise: twice the negative logarithm of the posterior for the noise that is left, up to a constant.
    """

    curve: Curve
    own: tuple[float, float, float]
    rows: np.ndarray
    surprise: float


def _climbed(results: _Results, centre: np.ndarray) -> _Optimum:
    """The maximum of the posterior that is reached from the prior's centre."""
    formula, quality, spread = results.formula, results.quality, results.spread
    here, damping = results.curve(centre), 0.0
    for step in range(STEPS):
        misfit, slopes = quality - here.heights, here.slopes(formula.kinds, results.features)
        if step in CHOSEN:
            target = misfit + slopes @ (here.values - centre)  # of the linearised model, from the prior's centre
            own, least = _chosen(slopes, target, spread, formula)
            priors = formula.priors(spread, own)
            free = np.flatnonzero(priors)
            if here.values[priors == 0].any():  # they were free before
                here = results.curve(np.where(priors > 0, here.values, centre))
                misfit, slopes = quality - here.heights, here.slopes(formula.kinds, results.features)
        noise = max(least, UNSETTLED * float(np.sqrt((misfit**2).mean())))
        rows, off = slopes[:, free] * (priors[free] / noise), (here.values - centre)[free] / priors[free]
        ridge, downhill = _Ridge(rows), rows.T @ (misfit / noise) - off
        before = after = _squares(misfit / noise, off)
        for _ in range(TRIES):
            values = here.values.copy()
            values[free] += priors[free] * ridge.solved(downhill, 1 + damping)
            there = results.curve(values)
            after = _squares((quality - there.heights) / noise, (values - centre)[free] / priors[free])
            if after < before:
                here, damping = there, damping / 10 if damping > 1 else 0.0
                break
            damping = max(1.0, 10 * damping)
        if step >= CHOSEN[-1] and before - after < SETTLED:
            break
    left = float(((quality - here.heights) ** 2).mean()) + (NOISE[0] * spread) ** 2
    surprise = len(quality) * np.log(left) + _squares((here.values - centre)[free] / priors[free])
    return _Optimum(curve=here, own=own, rows=rows, surprise=surprise)


def guess(prior: np.ndarray) -> LossModel:
    """What is believed before any result: the prior's sensitivities, and a loss that is the logarithm of their sum."""
    count = len(prior)
    outer = [0.0, 0.0, np.log(FLOOR * prior.sum()), np.log(FLOOR / prior.sum())]
    return LossModel(
        formula=Formula(kinds=np.ones((count, 1)), edges=np.zeros(0), gaps=np.zeros(0)),
        values=np.concatenate([outer, [0.0, 0.0], np.log(prior), np.zeros(count)]),
        trust=1.0,
        priors=np.concatenate([np.zeros(OUTER + 2), np.ones(count), np.zeros(count)]),
        rows=np.zeros((0, count)),
        known=np.zeros((0, count)),
        pull=np.zeros(0),
    )


def _starts(results: _Results, prior: np.ndarray) -> list[np.ndarray]:
    """The best a and c for the first slope and e1 and one of the e0; and those for any of them, if they fit better.

    The prior's sensitivities are scaled to a typical sum of 1.
    """
    bits, quality, formula = results.bits, results.quality, results.formula
    sums = np.exp(prior - LOG4 * bits + SLOPES[:, None, None] * (bits - MIDDLE)).sum(axis=2)
    middles = np.exp(np.log(sums).mean(axis=1, keepdims=True))
    totals = FLOORS[:, None, None] + sums / middles
    logs = np.log(totals / (1 + CEILINGS[:, None, None, None] * totals))  # (ceilings, floors, slopes, n)
    centred = logs - logs.mean(axis=-1, keepdims=True)
    scales = np.maximum(centred @ quality / np.maximum((centred**2).sum(axis=-1), FLOOR), 0.05 * results.spread)
    misfits = ((quality - quality.mean() - scales[..., None] * centred) ** 2).sum(axis=-1)
    plain = 0, int(misfits[0, :, 0].argmin()), 0
    best = np.unravel_index(int(misfits.argmin()), misfits.shape)
    found = []
    for place in dict.fromkeys([plain, tuple(map(int, best))]):
        ceiling, floor, slope = (each[i] for each, i in zip((CEILINGS, FLOORS, SLOPES), place, strict=True))
        values = np.zeros(formula.ends[-1])
        offset = quality.mean() - scales[place] * logs[place].mean()
        values[:OUTER] = offset, np.log(scales[place]), np.log(floor), np.log(ceiling)
        values[OUTER + 1] = slope
        values[slice(*formula.ends[1:3])] = prior - np.log(middles[place[2], 0])
        found.append(values)
    return found


def _chosen(
    slopes: np.ndarray, target: np.ndarray, spread: float, formula: Formula
) -> tuple[tuple[float, float, float], float]:
    """Prior widths and noise with the largest marginal likelihood of the last results of the linearised model."""
    known, wanted = slopes[-WEIGHED:], target[-WEIGHED:]
    first, *ends = formula.ends[1:]
    parts = [known[:, :first] * formula.priors(spread, PRIORS[0])[:first]]
    parts += [known[:, start:end] for start, end in pairwise([first, *ends])]
    squares = np.array([part @ part.T for part in parts])
    weights = np.array([(1.0, *prior) for prior in PRIORS]) ** 2
    eigen, basis = np.linalg.eigh(np.tensordot(weights, squares, axes=1))
    turned = (wanted @ basis) ** 2
    noises = spread * np.array(NOISE)
    variance = np.maximum(eigen, 0.0)[:, None, :] + noises[:, None] ** 2  # (priors, noises, results)
    evidence = -0.5 * (turned[:, None, :] / variance + np.log(variance)).sum(axis=2)
    t, k = np.unravel_index(int(evidence.argmax()), evidence.shape)
    return PRIORS[t], float(noises[k])


class _Ridge:
    """Solves (rows^T rows + ridge) x = wanted, by the smaller of both squares of the rows."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.wide = rows, rows.shape[0] < rows.shape[1]
        self.square = rows @ rows.T if self.wide else rows.T @ rows

    def solved(self, wanted: np.ndarray, ridge: float = 1.0) -> np.ndarray:
        """The x of each column, (columns,) or (columns, k)."""
        inner = self.square + ridge * np.eye(len(self.square))
        if not self.wide:
            return np.linalg.solve(inner, wanted)
        return (wanted - self.rows.T @ np.linalg.solve(inner, self.rows @ wanted)) / ridge


def _squares(*parts: np.ndarray) -> float:
    """Their sum; of misfits and of what is off the prior's centre, both in units of their standard deviations, it is
    twice the negative logarithm of the posterior, up to a constant."""
    return float(sum(part @ part for part in parts))


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
