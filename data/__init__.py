"""What training reads."""

from data.dataset import LatentDataset

__all__ = ["LatentDataset"]
