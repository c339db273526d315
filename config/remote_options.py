"""Options of train.py: data that lie elsewhere."""

import dataclasses

from config.rules import option


@dataclasses.dataclass
class RemoteOptions:
    """How much of remote data is kept on this machine."""

    cache_size: float | None = option(
        "data", None, "GiB that remote files which are not packed may take in --cache-dir; the oldest go (default: no bound)",
        gt=0, le=2**30, resume="free",
    )  # fmt: skip
