"""Files on the hub, as local copies."""

import contextlib
from pathlib import Path

from common.errors import UserError, first_line
from common.files import check_name
from common.tensor_files import PRETRAINED


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
    try:
        local = Path(hf_hub_download(f"{owner}/{repository}", file))
        if name == PRETRAINED:  # pushed by `push_to_hub`, it has its configuration beside it
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(f"{owner}/{repository}", f"{folder}/config.json".lstrip("/"))
        return local
    except Exception as error:  # network, authentication, no such repository or file, no space …
        raise UserError(
            f"{text}: could not be downloaded ({type(error).__name__}: {first_line(error)}); give a local file"
        ) from None
