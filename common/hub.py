"""Files on the hub, as local copies."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError, first_line
from common.files import cache_folder, check_name, lock
from common.tensor_files import PRETRAINED

T = TypeVar("T")


def fetch_once(name: str, fetch: Callable[..., T]) -> T:
    """`fetch()`, which downloads `name` to a cache, in one of the processes that a launcher started on this machine.

    Then `fetch(local_files_only=True)` in the others, which ask nobody.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        return fetch()
    launch = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.environ.get('MASTER_PORT')} {os.getppid()}"
    try:
        path = cache_folder() / f"hub-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        while (file := lock(path)) is None:
            time.sleep(0.1)
    except OSError:  # no locks here
        return fetch()
    with file:
        file.seek(0)
        if file.read() == launch:
            with contextlib.suppress(Exception):  # gone from the cache meanwhile
                return fetch(local_files_only=True)
        fetched = fetch()
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(launch)
        return fetched


def local_folder(name: str, option: str, patterns: list[str]) -> Path:
    """A folder as it is; of a hub repository the local copy of its files that fit the patterns.

    Raises:
        UserError: neither, or no network; it begins with `option`.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{option} {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(fetch_once(name, partial(snapshot_download, name, allow_patterns=patterns)))
    except Exception as error:  # no network, no such repository, no space …
        raise UserError(
            f"{option} {name}: no such folder, and not to be had from the hub: {first_line(error)}; give a folder"
        ) from None


def local_file(path: str | Path) -> Path:
    """A file as it is; of a folder of `save_pretrained` its weights; `hf://owner/repo/file` as the local copy of that file."""
    text = str(path)
    if not text.startswith("hf://"):
        pretrained = Path(path) / PRETRAINED
        return pretrained if pretrained.is_file() else Path(path)
    owner, _, rest = text.removeprefix("hf://").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{text}: must be hf://owner/repo/file")
    for part, plain in ((owner, True), (repository, True), (file, False)):
        check_name(part, text, plain=plain)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder, _, name = file.rpartition("/")

    def fetch(**options: Any) -> Path:
        local = Path(hf_hub_download(f"{owner}/{repository}", file, **options))
        if name == PRETRAINED:  # pushed by `push_to_hub`, it has its configuration beside it
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(f"{owner}/{repository}", f"{folder}/config.json".lstrip("/"), **options)
        return local

    try:
        return fetch_once(text, fetch)
    except Exception as error:  # network, authentication, no such repository or file, no space …
        raise UserError(
            f"{text}: could not be downloaded ({type(error).__name__}: {first_line(error)}); give a local file"
        ) from None
