"""Features of a reference, kept beside it: `REF.features-HASH.npz`, for the reference's content and the networks that saw it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import WriteError, write_atomically
from metrics.feature_extractors import Network
from metrics.features import Features, features_of, read_batch

FORMAT = 1
PROBES = 4  # first images, whose features tell whether the networks are still those that the file is from
TOLERANCE = 1e-3  # of a feature, relative to the largest: other devices round differently, other weights are far off

Warn = Callable[[str], None]


def path_of(features: Features, networks: Sequence[Network], ref_sha256: str) -> Path:
    """The file: named by a hash of the reference, the networks and the kinds of features."""
    kinds = sorted(features.gather), sorted(features.keep)
    made_of = [FORMAT, ref_sha256, sorted(network.identity for network in networks), *kinds]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    path = features.images.path.resolve()
    return path.with_name(f"{path.name}.features-{digest[:16]}.npz")


def read(path: Path, features: Features, networks: Sequence[Network], warn: Warn) -> bool:
    """Fill `features` from the file; False where it does not exist, is damaged, or is of networks that now give other features."""
    if not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        gaussians = {kind: (arrays[f"{kind}_mean"], arrays[f"{kind}_covariance"]) for kind in features.gather}
        rows = {kind: arrays[f"{kind}_rows"] for kind in features.keep}
        probes = {kind: arrays[f"{kind}_probe"] for kind in features.wanted}
    except Exception as error:  # zipfile and NumPy raise whatever they like on damaged files
        warn(f"{path}: damaged ({type(error).__name__}); made anew")
        return False
    for kind, found in _probes(features, networks).items():
        if found.shape != probes[kind].shape or np.abs(found - probes[kind]).max() > TOLERANCE * np.abs(found).max():
            warn(f"{path}: the feature networks have changed since; made anew")
            return False
    features.gaussians, features.rows = gaussians, rows
    return True


def write(path: Path, features: Features, networks: Sequence[Network], warn: Warn) -> None:
    """Keep `features`, which are gathered; where that cannot be done, a warning says so."""
    arrays: dict[str, Any] = {f"{kind}_rows": rows for kind, rows in features.rows.items()}
    for kind in features.gather:
        arrays[f"{kind}_mean"], arrays[f"{kind}_covariance"] = features.gaussian(kind)
    arrays |= {f"{kind}_probe": rows for kind, rows in _probes(features, networks).items()}
    try:
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except WriteError as error:
        warn(f"{error}: the features of {features.images.path} are computed again next time")


def _probes(features: Features, networks: Sequence[Network]) -> dict[str, np.ndarray]:
    """The features of the first images."""
    span = range(min(PROBES, features.images.count))
    used = [network for network in networks if features.wanted & network.dims.keys()]
    return features_of(used, (span, read_batch(features.images, span)), features.wanted, PROBES, str(features.images.path))
