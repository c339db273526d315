"""Mean and covariance, Fréchet distance and Inception Score, in float64."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from common.errors import UserError, first_line

CHUNK = 1000  # rows that enter the covariance together
SINGULAR_OFFSET = 1e-6
JUDGED_DIM = 512  # up to here scipy's matrix root takes less than a second


class RunningStatistics:
    """Mean and covariance (N − 1) of rows that arrive batch by batch, in float64 (Chan, Golub and LeVeque 1983).

    Rows are taken in chunks of fixed size: the same rows in the same order give the same bits, however they are batched.

    Args:
        dim: of a row.
        device: where products are computed and added up; None: by NumPy.
    """

    def __init__(self, dim: int, device: torch.device | None = None):
        self.dim, self.count, self._device = dim, 0, device
        self._mean, self._scatter = np.zeros(dim), self._place(np.zeros((dim, dim)))  # of the first `_done` rows
        self._done = 0
        self._waiting: list[np.ndarray] = []

    def update(self, features: ArrayLike) -> None:
        """Add rows (n, dim)."""
        rows = np.asarray(features)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise UserError(f"features of shape {rows.shape}; wanted (n, {self.dim})")
        self.count += len(rows)
        while len(rows):
            free = CHUNK - sum(map(len, self._waiting))
            self._waiting.append(rows[:free].astype(np.float64))
            rows = rows[free:]
            if sum(map(len, self._waiting)) == CHUNK:
                self._take_waiting()

    def merge(self, other: "RunningStatistics") -> None:
        """Add all rows of `other`."""
        if other.dim != self.dim:
            raise UserError(f"statistics of {other.dim} and of {self.dim} dimensions cannot be merged")
        self._take_waiting()
        other._take_waiting()
        self.count += other.count
        self._combine(other._done, other._mean, self._place(_to_numpy(other._scatter)))

    @property
    def mean(self) -> np.ndarray:
        """The mean (dim,)."""
        if not self.count:
            raise UserError("the mean of no rows")
        self._take_waiting()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """The covariance (dim, dim), divided by N − 1."""
        if self.count < 2:
            raise UserError(f"the covariance of {self.count} row(s); it takes at least 2")
        self._take_waiting()
        return _to_numpy(self._scatter) / (self.count - 1)

    def _place(self, array: np.ndarray) -> Any:
        return array if self._device is None else torch.from_numpy(array).to(self._device)

    def _take_waiting(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting)
            self._waiting = []
            mean = rows.mean(axis=0)
            rows -= mean
            placed = self._place(rows)
            self._combine(len(rows), mean, placed.T @ placed)

    def _combine(self, count: int, mean: np.ndarray, scatter: Any) -> None:
        if not count:
            return
        total = self._done + count
        difference = mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._scatter += scatter
        self._scatter += self._place(difference)[:, None] * self._place(difference * (self._done * count / total))
        self._done = total


def _to_numpy(array: Any) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array


def covariance_problem(sigma: np.ndarray) -> str:
    """Why a matrix (d, d) is no covariance: not symmetric, or not positive semi-definite; an empty text where it is one.

    Both up to a millionth of its trace: statistics may be stored in float32.
    """
    sigma = np.asarray(sigma, dtype=np.float64)
    tolerance = 1e-6 * max(np.abs(np.diag(sigma)).sum(), np.finfo(np.float64).tiny)
    if np.diag(sigma).min() < -tolerance:
        return f"a negative variance ({np.diag(sigma).min():.4g})"
    if np.abs(sigma - sigma.T).max() > tolerance:
        return "not symmetric"
    try:
        np.linalg.cholesky(sigma + tolerance * np.eye(len(sigma)))  # a tenth of the time of the eigenvalues
    except np.linalg.LinAlgError:
        return "not positive semi-definite, it has negative eigenvalues"
    return ""


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Fréchet distance of two Gaussians, |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) (Heusel et al. 2017, arXiv 1706.08500).

    mu (d,), sigma (d, d). The trace of the root comes from a symmetric form of the product, which has the same eigenvalues. As in
    ADM's evaluator, 1e-6 is added to both diagonals for the root where the product is singular and `scipy.linalg.sqrtm` of it
    is not finite. `UserError` for values that are not finite and for shapes that do not match.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    d = mu1.size
    if not (mu1.shape == mu2.shape == (d,) and sigma1.shape == sigma2.shape == (d, d)):
        shapes = ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise UserError(f"statistics of shapes {shapes}; wanted (d,), (d, d), (d,), (d, d)")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("statistics that hold values which are not finite")
    try:
        offset = 0 if _root_is_finite(sigma1, sigma2) else SINGULAR_OFFSET * np.eye(d)
        factor = _factor(sigma1 + offset)
        # FᵀΣ₂F has those eigenvalues of the product FFᵀΣ₂ that are not zero.
        trace = np.sqrt(np.linalg.eigvalsh(factor.T @ (sigma2 + offset) @ factor).clip(min=0)).sum()
    except (ValueError, np.linalg.LinAlgError) as error:  # an overflow
        raise UserError(f"statistics whose covariances have no root: {first_line(error)}") from None
    distance = float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)
    if not math.isfinite(distance):
        raise UserError("statistics that are too large: their distance is not finite")
    return distance


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F (d, r) with FFᵀ = sigma and r its numerical rank, by Cholesky with pivoting: a deficient rank is no obstacle."""
    from scipy.linalg import get_lapack_funcs

    lower, pivots, rank, _ = get_lapack_funcs(("pstrf",), (sigma,))[0](sigma, lower=1)
    factor = np.empty((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def _root_is_finite(sigma1: np.ndarray, sigma2: np.ndarray) -> bool:
    """What ADM's evaluator asks of the product, to find out whether it is singular.

    scipy's root fails where eigenvalues are exactly zero. Rounding leaves none of these where too few images alone make the rank
    deficient; features that are constant do, and so may small hand-made matrices. Only those wait for that root.
    """
    if len(sigma1) > JUDGED_DIM and np.diag(sigma1).all() and np.diag(sigma2).all():
        return True
    from scipy.linalg import sqrtm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a singular matrix: that is the question
        return bool(np.isfinite(sqrtm(sigma1 @ sigma2)).all())


def inception_score(pool_features: ArrayLike, weight: ArrayLike, split_size: int = 5000) -> float:
    """Inception Score (Salimans et al. 2016) of pool features (N, d), weight (classes, d): no bias, as in ADM's evaluator.

    Splits of `split_size` in the order given, the last one with what is left; the mean over the splits.
    """
    features, weight = np.asarray(pool_features), np.asarray(weight, dtype=np.float64)
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise UserError(f"features of shape {features.shape} and a weight of shape {weight.shape} do not match")
    return _score(features, split_size, lambda part: part @ weight.T)


def score_of_logits(logits: ArrayLike, split_size: int = 5000) -> float:
    """The same of a classifier's logits (N, classes)."""
    return _score(np.asarray(logits), split_size, lambda part: part)


def _score(rows: np.ndarray, split_size: int, logits_of: Callable[[np.ndarray], np.ndarray]) -> float:
    from scipy.special import logsumexp

    if not len(rows) or split_size < 1:
        raise UserError(f"the score of {len(rows)} images in splits of {split_size}")
    scores = []
    for first in range(0, len(rows), split_size):
        logits = logits_of(rows[first : first + split_size].astype(np.float64))  # (n, classes)
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        log_marginal = logsumexp(log_p, axis=0) - np.log(len(log_p))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))
