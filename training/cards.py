"""GPUs by name: what their data sheets say of them."""

import re
from typing import NamedTuple


class Card(NamedTuple):
    """A GPU.

    Attributes:
        half, tf32: TFLOP/s that dense matrix products can reach: of 16 bits with float32 sums, and of float32 as TF32.
        bandwidth: of its memory, TB/s.
        memory: GiB, of which the driver takes a little.
    """

    half: int
    tf32: int | None
    bandwidth: float
    memory: int

    def peak(self, mixed_precision: str, allow_tf32: bool) -> float | None:
        """TFLOP/s in this precision; None where it is not known."""
        if mixed_precision == "no" and not allow_tf32:
            return None
        return self.tf32 if mixed_precision == "no" else self.half


# By whole words of the device's name: the first entry whose words stand together in it counts.
CARDS = {
    "B300": Card(2250, 1125, 8.0, 288),
    "B200": Card(2250, 1100, 8.0, 180),
    "GH200": Card(989, 494, 4.0, 96),
    "H200 NVL": Card(835, 417, 4.8, 141),
    "H200": Card(989, 494, 4.8, 141),
    "H100 PCIe": Card(756, 378, 2.0, 80),
    "H100 NVL": Card(835, 417, 3.9, 94),
    "H100": Card(989, 494, 3.35, 80),
    "H800 PCIe": Card(756, 378, 2.0, 80),
    "H800": Card(989, 494, 3.35, 80),
    "H20": Card(148, 74, 4.0, 96),
    "A100": Card(312, 156, 2.0, 80),
    "A800": Card(312, 156, 2.0, 80),
    "A40": Card(150, 75, 0.696, 48),
    "A30": Card(165, 82, 0.933, 24),
    "A10G": Card(70, 35, 0.6, 24),
    "A10": Card(125, 62, 0.6, 24),
    "L40S": Card(362, 183, 0.864, 48),
    "L40": Card(181, 90, 0.864, 48),
    "L4": Card(121, 60, 0.3, 24),
    "V100": Card(125, None, 0.9, 32),
    "RTX 6000 Ada": Card(364, 182, 0.96, 48),
    "RTX A6000": Card(155, 77, 0.768, 48),
    "RTX A4000": Card(77, 38, 0.448, 16),
    "RTX 5090": Card(209, 105, 1.792, 32),
    "RTX 4090": Card(165, 83, 1.008, 24),
    "RTX 3090": Card(71, 36, 0.936, 24),
}
OTHERS = {"Laptop", "Max", "D", "Ti"}  # words of slower or faster cards that share a name with one of these


def find_card(name: str) -> Card | None:
    """The card with this name, e.g. "NVIDIA H100 80GB HBM3"; None where it is not known."""
    words = re.findall(r"\w+", name)
    spaced = f" {' '.join(words)} "
    return next((card for known, card in CARDS.items() if f" {known} " in spaced and OTHERS.isdisjoint(words)), None)
