"""What ADM's evaluator computes, in NumPy and scipy from its definitions; shares no code with `metrics`."""

import warnings

import numpy as np
import scipy.linalg


def gaussian(rows):
    return rows.mean(axis=0, dtype=np.float64), np.cov(rows.astype(np.float64), rowvar=False)


def adm_frechet(mu1, sigma1, mu2, sigma2):
    """ADM's formula: scipy's root of the product, and of the product with 1e-6 on the diagonals where that is not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            offset = 1e-6 * np.eye(len(sigma1))
            root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


def half_distances(u, v):
    """Squared distances, every step rounded to float16 as the definition says; NaN and inf where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        u, v = u.astype(np.float16), v.astype(np.float16)
        uu, vv = ((x * x).sum(axis=1, dtype=np.float32).astype(np.float16) for x in (u, v))
        uv = (u.astype(np.float32) @ v.T.astype(np.float32)).astype(np.float16)
        return np.maximum((uu[:, None] - np.float16(2) * uv) + vv[None, :], np.float16(0)).astype(np.float32)


def exact_distances(u, v):
    return np.maximum(((u**2).sum(1)[:, None] - 2 * u @ v.T) + (v**2).sum(1)[None, :], 0)


def neighbour_shares(ref, samples, distances, k=3):
    """(precision, recall) from whole matrices of distances."""
    ref_radii, sample_radii = (np.sort(distances(x, x), axis=1)[:, k] for x in (ref, samples))
    between = distances(ref, samples)
    return (between <= ref_radii[:, None]).any(axis=0).mean(), (between <= sample_radii[None, :]).any(axis=1).mean()


def inception_score(logits, split_size):
    """Mean over splits, in order, of exp(mean KL to the split's marginal)."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for first in range(0, len(p), split_size):
        part = p[first : first + split_size]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1).mean()))
    return np.mean(scores)
