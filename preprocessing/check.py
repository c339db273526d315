"""Is a data set whole and sound, what is in it, and what are the statistics of its latents?"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import image_files
from common.errors import UserError
from common.file_tree import FileTree, read_regular
from common.files import check_output, decode_name, file_sha256, make_folder
from config.tool_options import CheckConfig
from data import latent_files, remote
from data.captions import RECORD_FILE, TextFeatures, has_captions, packed_checksums, read_captions, text_folder
from data.coco_layout import CocoLatents
from data.dataset import LatentDataset, Latents, open_text, paired_images
from data.packed import PackedLatents, checksums, read_index
from preprocessing.source import prefetch

BLOCK = 256  # latents read at once


SHOWN = 20  # problems printed of each kind


GRID = 8  # latents decoded by --sample-grid


def check(config: CheckConfig) -> None:
    """Sizes, labels, checksums and values of the latents, their images where there are any, and the classes. Exit code 1: problems."""
    if not remote.is_remote(config.source) and not Path(config.source).is_dir():
        raise UserError(f"--source {config.source}: no such data folder")
    if config.sample_grid is not None:
        check_output("--sample-grid", config.sample_grid)
    problems = Problems()
    try:
        dataset = LatentDataset(config.source, cache_dir=config.cache_dir, option="--source")
    except UserError as error:  # without labels, index or first latent there is nothing more to look at
        problems.add("data set", str(error))
        problems.end(config.source)
        return
    latents = dataset.latents
    print(
        f"{latents.path}: {len(latents)} latents of {'x'.join(map(str, latents.shape))}, {latents.dtype}, by {dataset.record.vae}"
        + (", and as many of the mirrored images" if latents.flips else "")
    )
    if isinstance(latents, PackedLatents):
        check_checksums(latents, problems)
    with ThreadPoolExecutor(config.workers) as threads:
        check_values(latents, threads, problems)
        images = images_of(config.source)
        if images is not None:
            check_images(images, dataset, threads, problems)
        if isinstance(latents, CocoLatents) or text_folder(config.source) is not None:
            check_text(config.source, images, latents, threads, problems)
    try:
        dataset.check()
        print_classes(latents.labels)
    except UserError as error:
        problems.add("label", str(error))
    if config.sample_grid is not None and not problems.count:
        draw_grid(config, dataset, images, Path(config.sample_grid))
    problems.end(config.source)


class Problems:
    """What is wrong, printed as it is found, the first few of each kind."""

    def __init__(self) -> None:
        self.count = 0
        self._of_kind: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        """Count and print one problem."""
        self.count += 1
        self._of_kind[kind] = self._of_kind.get(kind, 0) + 1
        if self._of_kind[kind] <= SHOWN:
            tqdm.write(f"{kind}: {text}")

    def end(self, source: str) -> None:
        """The verdict; exit code 1 for any problem."""
        if not self.count:
            print(f"{source}: sound")
            return
        print(f"{source}: {self.count} problems: " + ", ".join(f"{n} × {kind}" for kind, n in self._of_kind.items()))
        raise SystemExit(1)


def blocks(count: int, name: str) -> Iterator[range]:
    """Blocks of indices, with a progress bar."""
    with tqdm(total=count, desc=name, unit="image") as bar:
        for start in range(0, count, BLOCK):
            block = range(start, min(start + BLOCK, count))
            yield block
            bar.update(len(block))


def check_checksums(latents: PackedLatents, problems: Problems) -> None:
    """Packed files are what the index says."""
    for file, digest in tqdm(checksums(read_index(latents.path)).items(), "checksums", unit="file"):
        if file_sha256(latents.path / file) != digest:
            problems.add("checksum", f"{latents.path / file}: its SHA-256 is not what the index says")


def check_text_checksums(folder: Path, problems: Problems) -> None:
    """Packed text features are what text.json says."""
    try:
        digests = packed_checksums(read_regular(folder / RECORD_FILE), str(folder / RECORD_FILE))
        for file, digest in tqdm(digests.items(), "checksums of text", unit="file"):
            if file_sha256(folder / file) != digest:
                problems.add("checksum", f"{folder / file}: its SHA-256 is not what {RECORD_FILE} says")
    except UserError as error:
        problems.add("checksum", str(error))


def check_values(latents: Latents, threads: ThreadPoolExecutor, problems: Problems) -> None:
    """Readable, of one size, finite, means not all equal, deviations not negative."""
    kinds = [False, True] if latents.flips else [False]  # whether mirrored

    def of_block(block: range) -> list[tuple[str, str]]:
        found = []
        for index in block:
            try:
                for moments in latents.read([index] * len(kinds), kinds):
                    found += [(problem, latents.where(index)) for problem in wrong(moments.numpy())]
            except UserError as error:
                found.append(("latent", str(error)))
        return found

    def wrong(moments: np.ndarray) -> list[str]:
        mean, std = np.split(moments, [latents.record.latent_channels])  # std is empty where there is no posterior
        if not np.isfinite(moments).all():
            return ["not finite"]
        return ["constant"] if mean.max() == mean.min() else ["negative deviation"] if (std < 0).any() else []

    for found in prefetch(threads, of_block, blocks(len(latents), "latents"), ahead=8):
        for kind, text in found:
            problems.add(kind, text)


def images_of(source: str) -> FileTree | None:
    """The images beside the latents, where there are any."""
    if remote.is_remote(source):
        return None
    return next((FileTree(p) for p in (Path(source) / "images", Path(source) / "images.zip") if p.exists()), None)


def check_images(images: FileTree, dataset: LatentDataset, threads: ThreadPoolExecutor, problems: Problems) -> None:
    """Each latent has its image and each image its latent, of the right size and with the same label."""
    latents = dataset.latents
    try:
        listed = images.names()
        names = [decode_name(name) for name in paired_images(images, latents)]
        labels = latent_files.read_labels(images) if latent_files.LABEL_FILE in listed else None
    except UserError as error:
        problems.add("pairing", str(error))
        return
    for name in sorted(set(image_files.stored_image_names(listed)) - set(names)):
        problems.add("pairing", f"{images.where(name)}: has no latent")
    for index, name in enumerate(names if latent_files.LABEL_FILE in listed else []):
        label = None if latents.labels is None else int(latents.labels[index])
        if (None if labels is None else labels.get(name)) != label:
            problems.add("label", f"{images.where(name)}: is labelled otherwise than {latents.where(index)}, {label}")
    wanted = tuple(dataset.record.downsample_factor * n for n in latents.shape[1:])

    def of_block(block: range) -> list[str]:
        found = []
        for index in block:
            try:
                shape = image_files.read_image(images, names[index]).shape[:2]
                if shape != wanted:
                    found.append(f"{images.where(names[index])}: has {shape} pixels; its latents were made of {wanted}")
            except UserError as error:
                found.append(str(error))
        return found

    for found in prefetch(threads, of_block, blocks(len(names), "images"), ahead=8):
        for text in found:
            problems.add("image", text)


def check_text(source: str, images: FileTree | None, latents: Latents, threads: ThreadPoolExecutor, problems: Problems) -> None:
    """Each image has as many text features as captions; readable, of the recorded shape, finite."""
    try:
        features = open_text(source, latents)
        captions = read_captions(images) if images is not None and has_captions(images) else None
    except UserError as error:
        problems.add("text", str(error))
        return
    if isinstance(features, TextFeatures) and features.is_packed:
        check_text_checksums(features.folder, problems)
    record = features.record
    print(f"{len(features)} images with text features of {record.length} × {record.width}, by {record.encoder}")
    wanted = None if captions is None else [len(texts) for texts in captions.values()]
    if wanted is not None and len(wanted) != len(features):
        problems.add("text", f"{source}: features of {len(features)} images, but {len(wanted)} have captions")
        return

    def of_block(block: range) -> tuple[int, list[str]]:
        found, total = [], 0
        for index in block:
            try:
                n = len(features.read(index).features)
                total += n
                if wanted is not None and n != wanted[index]:
                    found.append(f"{features.where(index)}: features of {n} captions, but the image has {wanted[index]}")
            except UserError as error:
                found.append(str(error))
        return total, found

    total = 0
    for n, found in prefetch(threads, of_block, blocks(len(features), "text"), ahead=8):
        total += n
        for text in found:
            problems.add("text", text)
    if isinstance(features, TextFeatures) and total != features.content["count"]:
        problems.add("text", f"{features.folder}: features of {total} captions; {RECORD_FILE} says {features.content['count']}")


def print_classes(labels: np.ndarray | None) -> None:
    """How many latents the classes have: each one where they are few, else how many classes have how many."""
    if labels is None:
        print("unlabelled")
        return
    classes, used = np.unique(labels, return_counts=True)
    print(f"{len(used)} classes of {used.min()} to {used.max()} images, median {np.median(used):g}")
    counts, total = dict(zip(classes.tolist(), used.tolist(), strict=True)), int(classes[-1]) + 1
    if total > len(counts):
        missing = itertools.islice((label for label in range(total) if label not in counts), SHOWN)
        print(f"{total - len(counts)} classes below {total} have none: {', '.join(map(str, missing))}")
    if total <= SHOWN:
        rows = [(str(label), counts.get(label, 0)) for label in range(total)]
    else:
        numbers, edges = np.histogram(used, bins=min(10, len(np.unique(used))))
        rows = [(f"{a:.0f}–{b:.0f} images", n) for a, b, n in zip(edges[:-1], edges[1:], numbers, strict=True)]
    for name, n in rows:
        print(f"  {name:>20} {n:8d} {'█' * round(40 * n / max(n for _, n in rows))}")


def draw_grid(config: CheckConfig, dataset: LatentDataset, images: FileTree | None, path: Path) -> None:
    """A PNG of a few latents decoded (their means), and below them their images where there are any."""
    import torch

    from common.image_files import save_png
    from common.plotting import image_grid
    from models.vae import decode, load_vae, sample_latents

    chosen = np.linspace(0, len(dataset) - 1, min(GRID, len(dataset))).round().astype(int).tolist()
    vae, _ = load_vae(config.vae or dataset.record.vae, expected=dataset.record)
    moments = torch.stack(dataset.latents.read(chosen))
    zeros = torch.zeros(len(moments), dataset.record.latent_channels, *moments.shape[2:])
    rows = list(decode(vae, sample_latents(moments, zeros, dataset.record)).permute(0, 2, 3, 1).numpy())
    if images is not None:
        names = [decode_name(name) for name in paired_images(images, dataset.latents)]
        rows += [image_files.read_image(images, names[i]) for i in chosen]
    make_folder(path.parent, "--sample-grid: the folder")
    save_png(image_grid(np.stack(rows), columns=len(chosen)), path)
    print(f"{path}: latents {', '.join(map(str, chosen))}")
