"""CLIP score: how well images fit their prompts (Hessel et al. 2021, arXiv 2104.08718; without its factor 2.5, as is usual for text to image).

The mean over images of max(100·cos(E_image, E_prompt), 0), by any folder of transformers' CLIPModel with its tokenizer.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, first_line
from common.file_tree import FileTree
from data.captions import CAPTIONS_FILE, read_captions, read_prompts
from metrics.feature_extractors import CLIP_MEAN, CLIP_STD
from metrics.images import ImageSet
from models.text_encoders import weights_sha256


class ClipScore:
    """A CLIP model, and the prompts of a set of images.

    Args:
        folder: of transformers' CLIPModel, with its tokenizer.
        prompts: a text file with a prompt in each line, which the images go round; None: captions.json of the images.
        images: to be scored.
        device: of the model.

    Raises:
        UserError: no such folder or prompts.
    """

    def __init__(self, folder: str, prompts: str | None, images: ImageSet, device: torch.device):
        self.folder, self.images, self.device = Path(folder), images, device
        self.prompts = _prompts_of(images, prompts)
        if not self.folder.is_dir():
            raise UserError(f"--clip-score {folder}: no such folder; wanted: transformers' CLIPModel and its tokenizer")
        import transformers

        transformers.logging.set_verbosity_error()
        try:
            model: Any = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
            self.model = model.to(device).eval()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(f"--clip-score {folder}: cannot be loaded: {first_line(error)}") from None
        self.side, self.length = (
            self.model.config.vision_config.image_size,
            self.model.config.text_config.max_position_embeddings,
        )
        beside = self.folder / "preprocessor_config.json"
        own = json.loads(beside.read_text()) if beside.is_file() else {}
        scale = own.get("image_mean", CLIP_MEAN), own.get("image_std", CLIP_STD)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in scale)
        self._threads = ThreadPoolExecutor()

    def score(self, state: PartialState, batch_size: int) -> dict[str, Any]:
        """The score and what it belongs to; all processes call it, each sees its share of the images."""
        starts = range(batch_size * state.process_index, self.images.count, batch_size * state.num_processes)
        found: list[tuple[int, list[float]]] = []
        for start in tqdm(starts, desc="CLIP score", unit="batch", disable=not state.is_main_process):
            span = range(self.images.count)[start : start + batch_size]
            found.append((start, self.cosines(self.images.read(span), [self.prompts[i] for i in span]).tolist()))
        if state.num_processes > 1:
            found = gather_object(found)
        cosines = np.array([value for _, values in sorted(found) for value in values])
        values = {"clip_score": float(np.maximum(100 * cosines, 0).mean())}
        return values | {"clip_score_network": {"weights": str(self.folder), "sha256": weights_sha256(self.folder)}}

    @torch.inference_mode()
    def cosines(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Cosine (B,) of each image, uint8 (B, H, W, 3), and its prompt."""
        pixels = np.stack(list(self._threads.map(self._resized, images)))
        pixels = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        out = self.model(**tokens.to(self.device), pixel_values=(pixels - self.mean) / self.std)
        return F.cosine_similarity(out.image_embeds.double(), out.text_embeds.double()).cpu()

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """CLIP's own preprocessing: the shorter side to the model's, bicubic, and the centre of the longer one."""
        height, width = image.shape[:2]
        scale = self.side / min(height, width)
        size = max(self.side, int(width * scale)), max(self.side, int(height * scale))
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))


def _prompts_of(images: ImageSet, prompts: str | None) -> list[str]:
    """The prompt of each image. Raises UserError where they are not known."""
    if prompts is not None:
        lines = read_prompts(prompts)
        return [lines[i % len(lines)] for i in range(images.count)]
    folder = images.path.with_suffix("") if images.path.suffix == ".npz" else images.path
    if not (folder / CAPTIONS_FILE).is_file():
        raise UserError(f"--clip-score: {folder / CAPTIONS_FILE}, which generate.py writes, is missing; give --prompts")
    captions = [texts[0] for texts in read_captions(FileTree(folder)).values()]
    if len(captions) != images.count:
        raise UserError(
            f"--clip-score: {folder / CAPTIONS_FILE} has {len(captions)} captions, but there are {images.count} images"
        )
    return captions
