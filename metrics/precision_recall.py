"""Figures of nearest neighbours: precision and recall in the arithmetic of ADM's evaluator, density and coverage."""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError

BLOCK = 10_000  # ADM's evaluator looks at so many rows and columns at once, and repeats in float32 what overflows


TILE = 512  # rows of a block whose distances exist at one time on a CPU: they fit its cache and the allocator reuses them


T = TypeVar("T")


def precision_recall(
    ref_features: ArrayLike | Tensor,
    sample_features: ArrayLike | Tensor,
    k: int = 3,
    dtype: Literal["float16", "float32"] = "float16",
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[float, float]:
    """Improved (precision, recall) (Kynkäänniemi et al. 2019, arXiv 1904.06991) of features (N, d) and (M, d).

    The radius of a point is the squared distance to its k-th neighbour in its own set. Precision: the share of samples within the
    radius of at least one reference point; recall: the other way round. dtype "float16": distances are rounded as in ADM's
    evaluator, and so are the published figures. `UserError` for fewer than k + 1 points and values that are not finite.
    """
    if dtype not in ("float16", "float32"):
        raise UserError(f"dtype {dtype!r}: must be float16 or float32")
    ref, samples = _points(ref_features, sample_features, k, dtype, device)
    blocks = sum(len(a.blocks) * len(b.blocks) for a, b in ((ref, ref), (samples, samples), (ref, samples)))
    with tqdm(total=blocks, desc="precision, recall", unit="block", disable=not progress) as bar:
        ref_radii, sample_radii = _radii(ref, k, bar), _radii(samples, k, bar)
        ref_inside = torch.zeros(len(ref), dtype=torch.bool, device=device)
        samples_inside = torch.zeros(len(samples), dtype=torch.bool, device=device)
        for rows in ref.blocks:
            for columns in samples.blocks:

                def inside(distances: Tensor, tile: slice, columns: slice = columns) -> tuple[Tensor, Tensor]:
                    near_sample = (distances <= sample_radii[columns]).any(dim=1)  # (t,)
                    near_ref = (distances <= ref_radii[tile, None]).any(dim=0)  # (columns,)
                    return near_sample, near_ref

                near_sample, near_ref = zip(*_reduced(ref, rows, samples, columns, inside), strict=True)
                ref_inside[rows] |= torch.cat(near_sample)
                samples_inside[columns] |= torch.stack(near_ref).any(dim=0)
                bar.update()
    return samples_inside.double().mean().item(), ref_inside.double().mean().item()


def density_coverage(
    ref_features: ArrayLike | Tensor,
    sample_features: ArrayLike | Tensor,
    k: int = 5,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[float, float]:
    """(density, coverage) of features (N, d) and (M, d) (Naeem et al. 2020, arXiv 2002.09797), by distances in float32.

    Each reference point has a ball up to its k-th neighbour in the reference. Density: in how many balls a sample lies on average,
    divided by k (it may exceed 1). Coverage: the share of balls in which a sample lies. `UserError` as of `precision_recall`.
    """
    ref, samples = _points(ref_features, sample_features, k, "float32", device)
    blocks = len(ref.blocks) * (len(ref.blocks) + len(samples.blocks))
    with tqdm(total=blocks, desc="density, coverage", unit="block", disable=not progress) as bar:
        radii = _radii(ref, k, bar)
        inside, covered = 0, torch.zeros(len(ref), dtype=torch.bool, device=device)
        for rows in ref.blocks:
            for columns in samples.blocks:

                def count(distances: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
                    near = distances < radii[tile, None]
                    return near.sum(), near.any(dim=1)

                counts, near_sample = zip(*_reduced(ref, rows, samples, columns, count), strict=True)
                inside += int(torch.stack(counts).sum())
                covered[rows] |= torch.cat(near_sample)
                bar.update()
    return inside / (k * len(samples)), covered.double().mean().item()


def _points(
    ref_features: ArrayLike | Tensor, sample_features: ArrayLike | Tensor, k: int, dtype: str, device: torch.device | str
) -> tuple["_Points", "_Points"]:
    """Both sets, ready for distances. `UserError` for fewer than k + 1 points and values that are not finite."""
    ref, samples = (torch.as_tensor(f).to(device, torch.float32) for f in (ref_features, sample_features))
    for name, features in (("reference", ref), ("sample", samples)):
        if features.dim() != 2 or features.shape[1] != ref.shape[1]:
            raise UserError(f"{name} features of shape {tuple(features.shape)}; wanted (n, {ref.shape[-1]})")
        if len(features) < k + 1:
            raise UserError(f"{len(features)} {name} images: figures of neighbours need at least k + 1 = {k + 1}")
        if not features.isfinite().all():
            raise UserError(f"{name} features hold values that are not finite")
    return _Points(ref, dtype), _Points(samples, dtype)


class _Points:
    """Features (N, d) in float32 and, for float16 distances, rounded to float16 (kept in float32) with their squared norms."""

    def __init__(self, features: Tensor, dtype: str):
        self.features = {torch.float32: features}
        self.squared_norms = {torch.float32: features.square().sum(dim=1)}
        self.dtypes = [torch.float32]
        if dtype == "float16":
            self.dtypes.insert(0, torch.float16)
            rounded = features.half().float()
            squares = torch.cat([part.square().half().float().sum(dim=1) for part in rounded.split(BLOCK)])
            self.features[torch.float16], self.squared_norms[torch.float16] = rounded, squares.half()
        self.blocks = [slice(i, min(i + BLOCK, len(features))) for i in range(0, len(features), BLOCK)]

    def __len__(self) -> int:
        return len(self.features[torch.float32])


def _distances(u: _Points, rows: slice, v: _Points, columns: slice, dtype: torch.dtype) -> Tensor:
    """Squared distances ‖u‖² − 2u·v + ‖v‖² (rows, columns) in float32.

    In float16, products are summed in float32, and every other step is rounded to float16: the product, its double (which may
    overflow), and the terms added from left to right.
    """
    products = (u.features[dtype][rows] @ v.features[dtype][columns].T).to(dtype)
    products.mul_(-2).add_(u.squared_norms[dtype][rows, None]).add_(v.squared_norms[dtype][columns])
    return products.clamp_(min=0).float()


def _reduced(u: _Points, rows: slice, v: _Points, columns: slice, reduce: Callable[[Tensor, slice], T]) -> list[T]:
    """`reduce(distances, rows of the tile)` of every tile of one block; in float32 where float16 is not finite anywhere in it."""
    step = TILE if u.features[torch.float32].device.type == "cpu" else BLOCK
    tiles = [slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step)]
    results: list[T] = []
    for dtype in u.dtypes:
        results = []
        for tile in tiles:
            distances = _distances(u, tile, v, columns, dtype)
            if dtype == torch.float16 and not distances.amax().isfinite():  # NaN comes through amax
                break
            results.append(reduce(distances, tile))
        else:
            break
    return results


def _radii(points: _Points, k: int, bar: tqdm) -> Tensor:
    """Squared distance of each point to its k-th neighbour (N,): the (k + 1)-th smallest of its row, which holds itself."""
    radii = []
    for rows in points.blocks:
        nearest: Tensor | None = None
        for columns in points.blocks:
            candidates = torch.cat(_reduced(points, rows, points, columns, lambda d, _: _smallest(d, k + 1)))
            nearest = candidates if nearest is None else _smallest(torch.cat([nearest, candidates], dim=1), k + 1)
            bar.update()
        assert nearest is not None  # there is a block
        radii.append(nearest[:, k])
    return torch.cat(radii)


def _smallest(distances: Tensor, count: int) -> Tensor:
    """The smallest values of each row, ascending: (rows, up to count)."""
    return distances.topk(min(count, distances.shape[1]), dim=1, largest=False).values
