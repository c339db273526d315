"""A small classifier of the quick start's digits: whether a drawn digit is of the asked class, and features to compare sets.

    python experiments_updated/digit_classifier.py --dest quickstart/classifier.pt

trains it on the 4,000 training digits (seconds), prints its accuracy on the 1,000 held-out ones, and keeps its weights.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from common.errors import UserError, cli_main
from common.files import written_aside
from preprocessing import demo

WEIGHTS_VARIABLE = "DIGIT_CLASSIFIER"  # names the weights file that `factory` reads, or makes
FEATURE_DIM = 64


class DigitClassifier(nn.Module):
    """Grey digits (B, 1, 32, 32) in [0, 1] → features (B, 64) → logits (B, 10)."""

    def __init__(self):
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        self.trunk = nn.Sequential(*stage(1, 16), *stage(16, 32), *stage(32, FEATURE_DIM))  # (B, 64, 4, 4)
        self.pool = nn.Sequential(nn.Flatten(), nn.Linear(FEATURE_DIM * 16, FEATURE_DIM), nn.ReLU())
        self.head = nn.Linear(FEATURE_DIM, 10)

    def forward(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.pool(self.trunk(digits))
        return pool, self.head(pool)


def digit_images(held_out: bool) -> tuple[Tensor, Tensor]:
    """The digits as quarters of a canvas: uint8 (n, 3, 32, 32), labels int64 (n,)."""
    images, labels = demo.demo_digits(held_out)
    grey = torch.from_numpy(np.pad(images, [(0, 0), (2, 2), (2, 2)]))
    return grey[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels)


def train_classifier(*, seed: int = 0, epochs: int = 8, batch_size: int = 100) -> DigitClassifier:
    """Trains on the 4,000 training digits, each slightly shifted and scaled. The same seed gives the same weights."""
    images, labels = digit_images(held_out=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            _, logits = model(_jitter(_grey(images[chosen]), generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def features(model: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, 32, 32) → features (B, 64), logits (B, 10)."""
    return model(_grey(images.to(next(model.parameters()).device)))


def statistics(model: DigitClassifier, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (64,) and covariance (64, 64) of the features of uint8 (B, 3, 32, 32), for a Fréchet distance."""
    pool = features(model, images)[0].double().cpu().numpy()
    return pool.mean(axis=0), np.cov(pool, rowvar=False)


def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 (B, 3, 32, 32) that `model` puts in the classes `labels` (B,)."""
    _, logits = features(model, images)
    return (logits.argmax(dim=1).cpu() == labels.cpu()).double().mean().item()


def quarters(canvases: Tensor, mirrored: bool = False) -> Tensor:
    """The digits of canvases, row by row: (B, 3, 64, 64) → (4B, 3, 32, 32).

    `mirrored`: of canvases that hold one digit and its mirror images, all turned the right way round.
    """
    grid = canvases.unflatten(3, (2, 32)).unflatten(2, (2, 32))  # (B, 3, 2, 32, 2, 32)
    digits = grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, 4, 3, 32, 32)
    if mirrored:
        flips = ((), (-1,), (-2,), (-2, -1))
        digits = torch.stack([digit.flip(axes) for digit, axes in zip(digits.unbind(1), flips, strict=True)], dim=1)
    return digits.flatten(0, 1)


def load_or_train(path: str | Path | None = None) -> DigitClassifier:
    """The trained classifier: from the weights file `path`; where there is none yet, trained and kept there."""
    if path is None:
        return train_classifier()
    path = Path(path)
    if not path.exists():
        model = train_classifier()
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            torch.save(model.state_dict(), aside)
        return model
    model = DigitClassifier()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # not a torch file, truncated, carrying code, or other weights
        raise UserError(f"{path}: holds no weights of the digit classifier ({type(error).__name__}); remove it") from None
    return model.eval()


def factory(device: str | torch.device = "cpu") -> Callable[[Tensor], dict[str, Tensor]]:
    """A feature network for `--features`: uint8 (B, 3, H, W), digits of 32×32 or canvases of 64×64 → `pool`, `logits`.

    Of a canvas, `pool` is the features of its four quarters side by side (B, 256), and `logits` their mean (B, 10). The weights
    file is named by the environment variable DIGIT_CLASSIFIER; without it, the classifier is trained now.
    """
    model = load_or_train(os.environ.get(WEIGHTS_VARIABLE)).to(device)

    def extract(images: Tensor) -> dict[str, Tensor]:
        if images.shape[1:] == (3, 32, 32):
            pool, logits = features(model, images)
        elif images.shape[1:] == (3, 64, 64):
            pool, logits = features(model, quarters(images))
            pool, logits = pool.unflatten(0, (-1, 4)).flatten(1), logits.unflatten(0, (-1, 4)).mean(dim=1)
        else:
            raise UserError(f"digit classifier: images of shape {tuple(images.shape[1:])}; wanted (3, 32, 32) or (3, 64, 64)")
        return {"pool": pool, "logits": logits}

    # Tells this classifier's features from those of one with other weights.
    content = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    extract.sha256 = hashlib.sha256(content).hexdigest()
    return extract


def _grey(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) → float32 (B, 1, H, W) in [0, 1]."""
    return images.float().mean(dim=1, keepdim=True) / 255


def _jitter(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Each of (B, 1, 32, 32) shifted by up to two pixels and scaled by up to a tenth."""
    draws = torch.rand(len(digits), 3, generator=generator) * 2 - 1  # (B, 3) in [−1, 1]
    affine = torch.zeros(len(digits), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 + 0.1 * draws[:, 0]
    affine[:, :, 2] = draws[:, 1:] * 2 / 16  # in half sides of the image
    grid = F.affine_grid(affine, list(digits.shape), align_corners=False)
    return F.grid_sample(digits, grid, align_corners=False)


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dest", help="weights file; read if it is there already")
    model = load_or_train(parser.parse_args(argv).dest)
    print(f"digit classifier: {accuracy(model, *digit_images(held_out=True)):.3f} of the 1,000 held-out digits right")


if __name__ == "__main__":
    main()
