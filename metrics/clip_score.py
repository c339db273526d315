"""CLIP score: how well images fit their prompts (Hessel et al. 2021, arXiv 2104.08718; without its factor 2.5, as is usual for text to image).

The mean over images of max(100·cos(E_image, E_prompt), 0), by any folder of transformers' CLIPModel with its tokenizer.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.errors import UserError, first_line
from common.file_tree import FileTree
from common.image_files import image_names
from data.captions import CAPTIONS_FILE, own_captions, read_captions, read_prompts
from metrics.feature_extractors import CLIP_MEAN, CLIP_STD, Network
from metrics.images import ImageSet
from models.text_encoders import LOAD_ERRORS, load_pretrained, load_tokenizer, weights_sha256


class ClipScore(Network):
    """A CLIP model beside prompts: its one feature of an image, `clip_score` (B, 1), is the cosine of image and prompt.

    Args:
        folder: of transformers' CLIPModel, with its tokenizer.
        prompts: which the images go round.
        device: of the model.

    Raises:
        UserError: no such folder, or it cannot be loaded.
    """

    def __init__(self, folder: str, prompts: Sequence[str], device: torch.device):
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"--clip-score {folder}: no such folder; wanted: transformers' CLIPModel and its tokenizer")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self.model = load_pretrained(transformers.CLIPModel, path, device)
            self.tokenizer = load_tokenizer(f"--clip-score {folder}", path)
            beside = path / "preprocessor_config.json"
            own = json.loads(beside.read_text()) if beside.is_file() else {}
            scale = own.get("image_mean", CLIP_MEAN), own.get("image_std", CLIP_STD)
            mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in scale)
        except LOAD_ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"--clip-score {folder}: cannot be loaded: {first_line(error)}") from None
        super().__init__(
            "clip_score",
            lambda images: self.features(images, range(len(images))),
            weights=path,
            sha256=weights_sha256(path),
            dims={"clip_score": 1},
        )
        self.prompts, self.device = prompts, device
        self.side = self.model.config.vision_config.image_size
        self.length = self.model.config.text_config.max_position_embeddings
        self.mean, self.std = mean, std
        self._threads = ThreadPoolExecutor()

    def features(self, images: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        """See `Network`; images uint8 on the CPU."""
        pixels = np.stack(list(self._threads.map(self._resized, images.permute(0, 2, 3, 1).numpy())))
        pixels = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        out = self.model(**tokens.to(self.device), pixel_values=(pixels - self.mean) / self.std)
        return {"clip_score": F.cosine_similarity(out.image_embeds.double(), out.text_embeds.double())[:, None]}

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """CLIP's own preprocessing: the shorter side to the model's, bicubic, and the centre of the longer one."""
        height, width = image.shape[:2]
        scale = self.side / min(height, width)
        size = max(self.side, int(width * scale)), max(self.side, int(height * scale))
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))


def clip_score(cosines: np.ndarray) -> float:
    """The score of images by their cosines (N, 1)."""
    return float(np.maximum(100 * cosines.astype(np.float64), 0).mean())


def prompts_of(images: ImageSet, prompts: str | None) -> list[str]:
    """The prompts that a set of images goes round: the lines of a file, or captions.json of the images. Raises UserError."""
    if prompts is not None:
        if Path(prompts).is_dir():
            raise UserError(f"--prompts {prompts}: is a folder; wanted: a text file with a prompt in each line")
        return read_prompts(prompts)
    folder = images.path.with_suffix("") if images.path.suffix == ".npz" else images.path
    if not (folder / CAPTIONS_FILE).is_file():
        raise UserError(f"--clip-score: {folder / CAPTIONS_FILE}, which generate.py writes, is missing; give --prompts")
    tree = FileTree(folder)
    of_image = read_captions(tree) if image_names(tree.names()) else own_captions(tree)  # of generate.py --no-png
    captions = [texts[0] for texts in of_image.values() if texts]
    if len(captions) != images.count:
        raise UserError(
            f"--clip-score: {folder / CAPTIONS_FILE} has {len(captions)} captions, but there are {images.count} images"
        )
    return captions
