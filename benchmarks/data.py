"""Making and reading data, side by side in one run: `python -m benchmarks.data [reading] [remote] [convert] [encode] [text] [index]`.

Each line is the median over rounds of the ratio of two rates of the same round, with the bound that it must meet.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import dataset_tools
from benchmarks.baselines import FilesOneByOne
from common.errors import cli_main
from data.dataset import LatentDataset
from data.packed import FORMAT, INDEX_FILE, LABELS_FILE, NAMES_FILE, shard_file
from models.text_encoders import load_text_encoder
from models.vae import SD_VAE
from preprocessing import demo, digit_captions
from preprocessing import text as tool
from preprocessing.digit_captions import CAPTIONS

QUICKSTART_VAE = "experiments_updated/quickstart_vae"
ENTRIES, SHARD = 1_281_167, 8192  # ImageNet
CANVASES = 5000  # of the text quick start
TOKENS = 77  # of a caption, padding included


def in_turn(rounds: int, actions: dict[str, Callable[[], int]]) -> dict[str, list[float]]:
    """Rates (samples per second) of actions that return how many samples they did, one after the other in each round."""
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            count = action()
            rates[name].append(count / (time.perf_counter() - start))
    for name, values in rates.items():
        print(f"  {name:28} {statistics.median(values):12.1f} samples/s")
    return rates


def compare(rates: dict[str, list[float]], name: str, other: str, bound: float) -> bool:
    ratio = statistics.median([a / b for a, b in zip(rates[name], rates[other], strict=True)])
    print(f"{name} / {other}: {ratio:.2f} (at least {bound:g}) {'ok' if ratio >= bound else 'MISSED'}", flush=True)
    return ratio >= bound


def quietly(*argv: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        dataset_tools.main(list(argv))


# ------------------------------------------------------------------------------------------------------------- reading


def make_set(folder: Path, count: int) -> None:
    """Random 256-pixel PNGs, uncompressed, and their latents, in the published layout."""
    rng = np.random.default_rng(0)
    labels = []
    for i in range(count):
        sub = f"{i // 1000:05d}"
        for part in ("images", "vae-sd"):
            (folder / part / sub).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{sub}/img{i:08d}.png", compress_level=0)
        np.save(folder / f"vae-sd/{sub}/img-mean-std-{i:08d}.npy", rng.random((8, 32, 32), dtype=np.float32))
        labels.append([f"{sub}/img-mean-std-{i:08d}.npy", i % 1000])
    (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))


def one_pass(dataset: Dataset, limit: int, batch_size: int = 256) -> int:
    """Read batches in random order, as one training process does; returns how many samples."""
    sampler = BatchSampler(RandomSampler(dataset, num_samples=limit), batch_size, drop_last=True)
    return sum(batch_size for _ in DataLoader(dataset, batch_sampler=sampler))


def reading(folder: Path, rounds: int) -> bool:
    count = 2048
    make_set(folder, count)
    quietly("pack", f"--source={folder}/vae-sd", f"--dest={folder}/packed")
    both, npy, packed = FilesOneByOne(folder, images=True), FilesOneByOne(folder, images=False), LatentDataset(folder)
    rates = in_turn(
        rounds,
        {
            "PNG + npy, one by one": lambda: one_pass(both, 512),
            "npy, one by one": lambda: one_pass(npy, 2048),
            "packed": lambda: sum(one_pass(packed, 2048) for _ in range(8)),
        },
    )
    return compare(rates, "packed", "PNG + npy, one by one", 20) & compare(rates, "packed", "npy, one by one", 5)


def remote(folder: Path, rounds: int) -> bool:
    """Images and latents behind S3 (a server on loopback), file by file: epochs after the first, from the cache, against local files."""
    import s3fs
    from moto.server import ThreadedMotoServer

    count = 512
    make_set(folder, count)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # of the server: a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    secret = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= secret | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "NO_PROXY": host}
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    for part in ("images", "vae-sd"):
        files.put(f"{folder}/{part}", "bucket/set/", recursive=True)
    local = LatentDataset(folder, images=True)
    cached = LatentDataset("s3://bucket/set", images=True, cache_dir=str(folder / "cache"))
    in_turn(1, {"remote files, first epoch": lambda: one_pass(cached, count)})
    rates = in_turn(
        rounds,
        {"local files": lambda: one_pass(local, count), "remote files, from the cache": lambda: one_pass(cached, count)},
    )
    server.stop()
    return compare(rates, "remote files, from the cache", "local files", 0.8)


# -------------------------------------------------------------------------------------------------------------- making


def fresh(folder: Path, numbers: Iterable[int] = iter(range(10**9))) -> Path:
    return folder / f"dest-{next(numbers)}"


def at_once(jobs: list[tuple[Any, ...]], count: int) -> int:
    """Run functions with their arguments, each in a process of its own; returns `count`, what all of them do."""
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=function, args=args) for function, *args in jobs]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    assert not any(process.exitcode for process in runs)
    return count


def convert(folder: Path, rounds: int) -> bool:
    """JPEGs of ImageNet's usual size to 256 pixels, folder output; and what two runs at once give, the most that there is."""
    count, rng = 800, np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (25, 32, 3), dtype=np.uint8))
        path = folder / f"source/{i % 2}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)

    def run(source: Path, dest: Path, workers: int) -> int:
        quietly("convert", f"--source={source}", f"--dest={dest}", "--resolution=256x256",
                "--transform=center-crop-dhariwal", f"--workers={workers}")  # fmt: skip
        return count

    def two_runs() -> int:
        return at_once([(run, folder / f"source/{i}", fresh(folder), 1) for i in range(2)], count)

    source = folder / "source"
    actions = {"1 worker": lambda: run(source, fresh(folder), 1), "2 workers": lambda: run(source, fresh(folder), 2)}
    rates = in_turn(rounds, actions | {"two runs at once": two_runs})
    compare(rates, "2 workers", "two runs at once", 0.9)
    return compare(rates, "2 workers", "1 worker", 1.8)


def encode(folder: Path, rounds: int) -> bool:
    """The quick start's canvases by its VAE."""
    count = 256
    for i, (*_, canvas) in zip(range(count), demo.demo_canvases(held_out=True, per_class=26), strict=False):
        path = folder / f"images/00000/img{i:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas).convert("RGB").save(path, compress_level=0)

    def run(batch_size: int) -> int:
        quietly("encode", f"--source={folder}/images", f"--dest={fresh(folder)}", f"--vae={QUICKSTART_VAE}",
                f"--batch-size={batch_size}")  # fmt: skip
        return count

    run(32)  # imports and warm-up
    rates = in_turn(rounds, {"batch 1": lambda: run(1), "batch 32": lambda: run(32)})
    return compare(rates, "batch 32", "batch 1", 1.5)


def text(folder: Path, rounds: int) -> bool:
    """Captions of the quick starts' canvases by MiniLM, of 77 tokens: as the tool makes them (--packed), and one by one in a loop.

    One by one, each caption is padded to 77 tokens. Without padding it has `tokens` of them, and captions that images share are
    encoded once: the two make the first figure, times the cores, where batches compute no faster than single captions.
    """
    described = [
        [form(digits) for form in CAPTIONS.values()] for digits in digit_captions.drawn(held_out=False, count=CANVASES)
    ]
    by_class = [[CAPTIONS["count"]((digit,) * 4)] for digit in range(10) for _ in range(CANVASES // 10)]
    encoder: Any = load_text_encoder("minilm", TOKENS)
    halved: Any = load_text_encoder("minilm", TOKENS, dtype=torch.bfloat16)
    tokenizer, model = encoder._tokenizer, encoder._model
    numbers = iter(range(10**9))
    torch.set_num_threads(1)

    @torch.inference_mode()
    def one_by_one(captions: list[str]) -> int:
        for caption in captions[:128]:
            padded = tokenizer(caption, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
            model(input_ids=padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state.half()
        return 128

    def of_process(state: Any, canvases: list[list[str]], by: Any, dest: Any) -> None:
        shared = tool.SharedCaptions(dest.folder, "", canvases, dest.block)
        features = functools.partial(tool._features, by, dest.dtype)
        tool._fill_shared(shared, features, state)
        tool._fill(dest, canvases, shared, features, by.cut, state, 4)

    def by_tool(canvases: list[list[str]], ranks: int, by: Any = encoder) -> int:
        barrier, into = multiprocessing.Barrier(ranks), folder / str(next(numbers))
        into.mkdir()
        dest = tool.PackedText(into, [*range(CANVASES)], [*map(len, canvases)], by.record, np.dtype(np.float16), 64)
        dest.begin()
        states = [
            SimpleNamespace(process_index=n, num_processes=ranks, is_main_process=False, wait_for_everyone=barrier.wait)
            for n in range(ranks)
        ]
        at_once([(of_process, state, canvases, by, dest) for state in states], 0)
        shutil.rmtree(into)
        return sum(map(len, canvases))

    good = True
    for name, canvases in (("captions of the text quick start", described), ("of classes", by_class)):
        captions = [caption for of_canvas in canvases for caption in of_canvas]
        tokens = {caption: len(tokenizer(caption).input_ids) for caption in captions}
        every, distinct = (sum(tokens[c] for c in some) / len(captions) for some in (captions, tokens))
        print(f"{name}: {every:.1f} tokens of {TOKENS}, {distinct:.2f} to be encoded: {TOKENS / distinct:.1f} times as many")
        ways = {
            "one by one": lambda captions=captions: one_by_one(captions),
            "one process": lambda canvases=canvases: by_tool(canvases, 1),
            "two processes": lambda canvases=canvases: by_tool(canvases, 2),
            "two in bfloat16": lambda canvases=canvases: by_tool(canvases, 2, halved),
        }
        rates = in_turn(rounds, ways)
        compare(rates, "two processes", "one by one", 10)
        good &= compare(rates, "two in bfloat16", "one by one", 20)
    return good


# --------------------------------------------------------------------------------------------------------------- index


def make_index(folder: Path) -> None:
    """Packed latents of ImageNet's size whose files are holes."""
    folder.mkdir()
    shape = (8, 32, 32)
    shards = []
    for number, start in enumerate(range(0, ENTRIES, SHARD)):
        count = min(SHARD, ENTRIES - start)
        with (folder / shard_file(number)).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)})
            file.truncate(file.tell() + 4 * count * int(np.prod(shape)))
        shards.append({"file": shard_file(number), "count": count, "sha256": ""})
    np.save(folder / LABELS_FILE, np.arange(ENTRIES) % 1000)
    np.save(folder / NAMES_FILE, np.array([f"{i // 1000:05d}/img-mean-std-{i:08d}.npy".encode() for i in range(ENTRIES)]))
    index = {"format": FORMAT, "shape": shape, "dtype": "float32", "labelled": True, "vae": SD_VAE.to_dict(), "sha256": {}}
    (folder / INDEX_FILE).write_text(json.dumps(index | {"shards": shards}))


def private_megabytes() -> float:
    """Memory of this process that it shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(n) for n in re.findall(r"Private_(?:Clean|Dirty): +(\d+)", text)) / 1024


class Measured(Dataset):
    """The data set, and with each batch the memory that its worker has come to need."""

    def __init__(self, dataset: LatentDataset):
        self.dataset, self.before = dataset, None

    def __getitems__(self, indices: list[int]) -> list[float]:
        if self.before is None:
            self.before = private_megabytes()
        labels = [item["label"] for item in self.dataset.__getitems__(indices)]
        assert labels == [i % 1000 for i in indices]
        return [private_megabytes() - self.before]


def build(folder: Path) -> tuple[float, float]:
    """Seconds and megabytes of building the object, in a process that has all imports."""
    before, start = private_megabytes(), time.perf_counter()
    dataset = LatentDataset(folder)
    dataset.check(num_classes=1000, resolution=256)
    assert len(dataset) == ENTRIES
    return time.perf_counter() - start, private_megabytes() - before


def index(folder: Path, rounds: int) -> bool:
    make_index(folder / "packed")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, megabytes = pool.apply(build, (folder,))
    dataset = Measured(LatentDataset(folder))
    workers = {}
    for method in ("fork", "spawn"):
        batches = np.random.default_rng(0).permutation(ENTRIES)[:2048].reshape(16, 128).tolist()
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=2, collate_fn=max, multiprocessing_context=method)
        workers[method] = max(loader)
    good = seconds <= 3 and max(megabytes, *workers.values()) <= 300
    print(
        f"index of {ENTRIES:,}: {seconds:.3f} s (at most 3), {megabytes:.0f} MB, and for each worker "
        + ", ".join(f"{mb:.0f} MB ({method})" for method, mb in workers.items())
        + f" (at most 300) {'ok' if good else 'MISSED'}"
    )
    return good


PARTS = {"reading": reading, "remote": remote, "convert": convert, "encode": encode, "text": text, "index": index}


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="data.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.rounds} rounds")
    good = True
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            good &= PARTS[part](Path(folder), args.rounds)
    sys.exit(not good)


if __name__ == "__main__":
    main()
