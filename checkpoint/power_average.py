"""Averages of the weights by power functions, and any such average as a sum of some (EDM2, arXiv 2312.02696, section 3 and appendix C).

The average of exponent γ after step t weighs the weights of step τ in proportion to τ^γ. Its relative length σ_rel is the standard
deviation of that profile as a share of t. Weights that stay as they are from one step to the next have exactly the profile
(γ + 1) τ^γ / t^(γ + 1) on [0, t]: the average by `weight_of_step` is its integral.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 12**-0.5  # the σ_rel of exponent 0, where all steps count alike

# The cost of the coefficients' squares, beside the square error of an average that is told by its distance from its step's weights:
# snapshots are rounded to bf16, by 0.0017 of their size, and weights are taken to be 5% away from their average.
RIDGE = 1e-3


def name(sigma: float) -> str:
    """What the average of this length is called among the averages of a run."""
    return f"sigma-{sigma:g}"


def exponent(sigma: float) -> float:
    """The exponent γ > 0 of a relative length below `LONGEST`: σ_rel = (γ + 1)^½ (γ + 2)^−1 (γ + 3)^−½."""
    # (γ + 2)² (γ + 3) σ² = γ + 1
    square = sigma**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def weight_of_step(step: int, exponent: float) -> float:
    """1 − β_γ(t): the share that the weights of step t ≥ 1 get in the average; all of it at the first step."""
    return 1.0 if step == 1 else -math.expm1((exponent + 1) * math.log1p(-1 / step))


class Combination(NamedTuple):
    """An average as a sum of others.

    Attributes:
        coefficients: one for each of the others; their sum is 1.
        error: how far the sum is from the average it stands for, as a share of how far that is from the weights of its step, both
            as root mean squares for weights that move at random.
    """

    coefficients: np.ndarray
    error: float


def combine(profiles: Sequence[tuple[float, float]], target: tuple[float, float]) -> Combination:
    """The sum of the averages `profiles`, (step, σ_rel) each, that is closest to `target`; coefficients that sum to 1.

    Least squares by closed-form inner products, as the paper's, but of the profiles' distributions F(τ) = (τ/t)^(γ + 1): weights
    that move at random are sums of independent moves, and what two profiles make of them differs by ∫ (F_a − F_b)² dτ. The paper's
    own, of the profiles, takes the weights themselves for independent: between snapshots its coefficients are several times as
    large, and multiply their rounding.
    """
    t, g = np.array([step for step, _ in profiles], float), np.array([exponent(sigma) for _, sigma in profiles])
    t_r, g_r = float(target[0]), exponent(target[1])
    n, end = len(t), max(t.max(), t_r)
    own, overlap = _inner(t[:, None], g[:, None], t, g, end), _inner(t, g, t_r, g_r, end)
    distance = t_r / (2 * g_r + 3)  # of the weights of step t_r, whose distribution is a step: ∫ F² up to there
    equations = np.ones((n + 1, n + 1))  # the last one: the sum
    equations[:n, :n] = own + RIDGE * distance * np.eye(n)
    equations[n, n] = 0
    x = np.linalg.solve(equations, np.append(overlap, 1.0))[:n]
    square = float(x @ own @ x - 2 * x @ overlap + _inner(t_r, g_r, t_r, g_r, end))
    return Combination(x, math.sqrt(max(square, 0.0) / distance))


def _inner(
    t_a: np.ndarray | float, g_a: np.ndarray | float, t_b: np.ndarray | float, g_b: np.ndarray | float, end: float
) -> np.ndarray:
    """∫ F_a F_b dτ from 0 to `end`, of F(τ) = min(τ/t, 1)^(γ + 1)."""
    t_a, t_b = np.asarray(t_a, float), np.asarray(t_b, float)
    early, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    g_late = np.where(t_a < t_b, g_b, g_a)
    below = early * (early / late) ** (g_late + 1)
    return below / (g_a + g_b + 3) + (late - below) / (g_late + 2) + end - late
