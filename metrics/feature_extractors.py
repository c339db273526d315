"""Feature networks: uint8 images (B, 3, H, W) on the CPU → a dict of features (B, d).

`pool`, `spatial` and the class weights are those of ADM's evaluator, by torch-fidelity's Inception; `dinov2` is the class token of
DINOv2 ViT-L/14 and `clip` the image embedding of CLIP ViT-L/14, by timm; any other network is named as module:factory.
"""

import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import hub, tensor_files
from common.errors import UserError, first_line
from common.file_facts import known_sha256
from common.files import file_sha256
from common.torchvision_shim import import_torchvision

SPATIAL_CHANNELS = 7  # of the 192 of the branch that sFID looks at


DINO_HUB = "hf://timm/vit_large_patch14_dinov2.lvd142m/model.safetensors"


DINO_SIDE, DINO_GRID = 224, 16  # pixels, and patches of 14 pixels, along a side


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_SIDE = 336


# Names of transformers → timm's, of what CLIP's image tower holds.
CLIP_NAMES = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "vision_model.embeddings.patch_embedding.": "patch_embed.proj.",
    "vision_model.pre_layrnorm.": "norm_pre.",
    "vision_model.post_layernorm.": "norm.",
    "vision_model.encoder.layers.": "blocks.",
    "visual_projection.": "head.",
    ".layer_norm": ".norm",
    ".self_attn.out_proj.": ".attn.proj.",
}


@dataclass
class Network:
    """A feature network and where its weights come from."""

    name: str
    extract: Callable[[Tensor], dict[str, Tensor]]
    weights: Path | None = None
    sha256: str | None = None
    source_sha256: str | None = None  # of the module of a network named by hand
    dims: dict[str, int] = field(default_factory=dict)  # kind of features → d, found by a first image
    class_weight: np.ndarray | None = None  # (classes, d): logits of `pool` without a bias, where it gives none itself

    def features(self, images: Tensor, indices: Sequence[int]) -> dict[str, Tensor]:
        """Features of `images` (B, 3, H, W), which are those of a set at `indices`."""
        return self.extract(images)

    @property
    def identity(self) -> str:
        """What tells its features from another network's, as far as that is known."""
        return f"{self.name} {self.sha256} {self.source_sha256}"


def inception(path: str | None, device: torch.device, warn: Callable[[str], None]) -> Network:
    """The Inception graph of 2015-12-05: `pool` (B, 2048) and `spatial` (B, 2023), as ADM's evaluator has them.

    path: weights in torch-fidelity's format (default: downloaded to where torch-fidelity looks for them).
    """
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    weights, state = _read_weights("--inception-weights", path or _download_inception(URL_INCEPTION_V3))
    sha256 = known_sha256(weights)
    if not sha256.startswith(_hash_in_name(URL_INCEPTION_V3)):
        warn(f"--inception-weights {weights}: not the published weights (sha256 {sha256[:16]}…); figures cannot be compared")
    # The package unpickles its file without restriction: it is given what was loaded with restriction, never the file itself.
    clean = io.BytesIO()
    torch.save(state, clean)
    clean.seek(0)
    try:
        model: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], clean)
    except Exception as error:  # missing keys, other shapes, values that are no tensors
        raise UserError(f"--inception-weights {weights}: {_other_network(error, 'torch-fidelity’s Inception')}") from None
    model.to(device)
    caught: list[Any] = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: caught.append(output))  # after its ReLU

    def extract(images: Tensor) -> dict[str, Tensor]:
        (pool,) = model(images.to(device))
        # (B, 192, 17, 17) → the first channels, laid out (17, 17, 7): the order of mu_s and sigma_s in reference files
        spatial = caught.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial}

    return Network("inception", extract, weights, sha256, class_weight=model.fc.weight.cpu().numpy())


def dinov2(path: str | None, device: torch.device) -> Network:
    """DINOv2 ViT-L/14: `dinov2` (B, 1024), the class token after the final norm, of images resized to 224×224 by Pillow.

    path: weights of timm or of the original, pickled or safetensors (default: timm's, from the hub).
    """
    import_torchvision()
    import timm

    weights, state = _read_weights("--dino-weights", path or DINO_HUB)
    state.pop("mask_token", None)  # of the original file; used in its training alone
    with torch.device("meta"):
        model: Any = timm.create_model("vit_large_patch14_dinov2", img_size=DINO_SIDE, num_classes=0)
    try:
        state["pos_embed"] = resample_positions(state["pos_embed"], DINO_GRID)
        model.load_state_dict(state, assign=True)
        model.float()
    except Exception as error:
        raise UserError(f"--dino-weights {weights}: {_other_network(error, 'DINOv2 ViT-L/14')}") from None
    model.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    threads = ThreadPoolExecutor()

    def resized(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((DINO_SIDE, DINO_SIDE), Image.Resampling.BICUBIC))

    def extract(images: Tensor) -> dict[str, Tensor]:
        small = np.stack(list(threads.map(resized, images.permute(0, 2, 3, 1).numpy())))  # uint8 again (B, 224, 224, 3)
        pixels = torch.from_numpy(small).to(device).permute(0, 3, 1, 2).float() / 255
        return {"dinov2": model.forward_features((pixels - mean) / std)[:, 0]}

    return Network("dinov2-vit-l-14", extract, weights, known_sha256(weights))


def clip(path: str, device: torch.device) -> Network:
    """CLIP ViT-L/14 at 336 px: `clip` (B, 768), the image embedding, of images resized in floating point, bicubic, as CMMD does.

    path: a folder of transformers' CLIPModel or CLIPVisionModelWithProjection (the hub's openai/clip-vit-large-patch14-336), its
    file of weights, or that of timm's `vit_large_patch14_clip_336.openai`.
    """
    import_torchvision()
    import timm

    pickled = Path(path) / "pytorch_model.bin"
    weights, state = _read_weights("--clip-weights", pickled if pickled.is_file() else path)
    with torch.device("meta"):
        model: Any = timm.create_model("vit_large_patch14_clip_quickgelu_336", num_classes=768)
    try:
        if "visual_projection.weight" in state:
            state = _clip_from_transformers(state)
        state.setdefault("head.bias", torch.zeros(768))
        model.load_state_dict(state, assign=True)
        model.float()
    except Exception as error:
        raise UserError(f"--clip-weights {weights}: {_other_network(error, 'CLIP ViT-L/14 at 336 px')}") from None
    model.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def extract(images: Tensor) -> dict[str, Tensor]:
        pixels = F.interpolate(images.to(device).float() / 255, (CLIP_SIDE, CLIP_SIDE), mode="bicubic")
        return {"clip": model((pixels - mean) / std)}

    return Network("clip-vit-l-14-336", extract, weights, known_sha256(weights))


def _clip_from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of transformers' CLIP under timm's names; text tower and position ids are left out."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(("vision_model.", "visual_projection.")) or name.endswith("position_ids"):
            continue
        for theirs, ours in CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = value
    found["cls_token"], found["pos_embed"] = found["cls_token"].view(1, 1, -1), found["pos_embed"][None]
    for kind in ("weight", "bias"):
        for name in [n for n in found if n.endswith(f".self_attn.q_proj.{kind}")]:
            qkv = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            found[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(qkv)
    return found


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """DINOv2's position embeddings for another grid: (1, 1 + n², D) → (1, 1 + grid², D).

    Bicubic, without antialiasing, and with the scale (grid + 0.1) / n instead of grid / n, as the original network does it:
    features of other resamplings cannot be compared.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    patches = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, n, n)
    scale = (grid + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([positions[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def by_name(name: str, device: torch.device) -> Network:
    """The network that `module:factory` names: factory(device) → uint8 (B, 3, H, W) on the device → dict of features."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    wanted = "wanted: module:factory, where factory(device) gives a function of images"
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # of the module, too
        raise UserError(f"--features {name}: cannot be imported: {first_line(error)}; {wanted}") from None
    try:
        extract: Any = factory(device)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--features {name}: {type(error).__name__}: {first_line(error)}; {wanted}") from None
    if not callable(extract):
        raise UserError(f"--features {name}: gives a {type(extract).__name__}; {wanted}")
    network: Any = extract  # `callable` would narrow it to what returns an object
    sha256 = getattr(extract, "sha256", None)
    source = getattr(sys.modules[module], "__file__", None)
    return Network(
        name,
        lambda images: network(images.to(device)),
        sha256=sha256 if isinstance(sha256, str) else None,
        source_sha256=file_sha256(source) if source else None,
    )


def _download_inception(url: str) -> Path:
    """The file where torch-fidelity keeps it, downloaded and its hash checked if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)

            def fetch(**_: bool) -> None:
                if not path.is_file():
                    torch.hub.download_url_to_file(url, str(path), hash_prefix=_hash_in_name(url))

            hub.fetch_once(url, fetch)
        except Exception as error:  # network, space, hash
            raise UserError(
                f"--inception-weights: could not be downloaded ({first_line(error)}); get {url} and put it at {path}, "
                "or give its path"
            ) from None
    return path


def _read_weights(option: str, path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The local file of a path or hf://owner/repo/file, and the tensors in it; read with the restricted unpickler."""
    try:
        local = hub.local_file(path)
        if local.suffix == ".safetensors":
            return local, tensor_files.load_safetensors(local)[0]
        return local, tensor_files.load(local)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _hash_in_name(url: str) -> str:
    """PyTorch's convention: the first eight digits of the sha256 stand at the end of the name."""
    match = re.search(r"-([0-9a-f]{8})\.pth$", url)
    assert match
    return match[1]


def _other_network(error: Exception, wanted: str) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"holds no weights of {wanted}: {' '.join(lines[:2])[:200]}"
