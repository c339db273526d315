"""Doing the cells of a sweep: one after the other, each by all processes, several jobs side by side."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

import models
from common.files import FolderLock, make_folder
from metrics.evaluation import versions
from metrics.features import Batch
from sampling import cost
from sampling.image_folder import ImageWriter, missing_images
from sampling.images import images
from sampling.session import Session, device_name
from sweeping.cells import Cell, Record, Store
from sweeping.planning import Plan, Source

WAIT = 2.0  # seconds between looks at cells that other jobs do


class Stopwatch:
    """Passes batches on, and measures how long each took to come."""

    def __init__(self, batches: Iterable[Batch], device: torch.device):
        self._batches, self._device = batches, device
        self._times: list[float] = []  # ms per image

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            cost.synchronize(self._device)
            if len(batch[0]):
                self._times.append(1000 * (time.perf_counter() - start) / len(batch[0]))
            yield batch

    @property
    def ms_per_image(self) -> float:
        """The median over batches."""
        return median(self._times)


class Runner:
    """Does cells; on every process alike, while the main one decides which."""

    def __init__(self, plan: Plan, store: Store):
        self.plan, self.store = plan, store
        self.sources = [(source, place) for source in plan.sources for place in range(len(source.configs))]
        self._session: Session | None = None
        self._loaded: Source | None = None
        self.done = 0

    def cells(self, count: int) -> list[Cell]:
        """All cells with so many images, on the main process; None of them elsewhere."""
        return [self._cell(source, place, count) for source, place in self.sources if source.settings]

    def _cell(self, source: Source, place: int, count: int) -> Cell:
        options = source.settings[place] | self.plan.scorers[source.ref].identity | {"num_samples": count}
        return Cell(source.configs[place], source.ref, count, options, source.gflops[place])

    def run(self, cells: Sequence[Cell], numbers: Sequence[int], count: int) -> list[Record]:
        """Do those of the cells `numbers` (places in `cells`) whose files are missing. Returns all records, on the main process.

        What another job is doing is left to it, and taken over where that job ends before it.
        """
        state = self.plan.state
        if state.is_main_process:
            make_folder(self.store.folder, "--dest")
        missing, announced = list(numbers), False
        while True:
            number, lock = self._next(cells, missing) if state.is_main_process else (None, None)
            number, key = broadcast_object_list([number, None if number is None or number < 0 else cells[number].key])
            if number is None:
                break
            if number < 0:
                if not announced and state.is_main_process:
                    print(f"waiting for {len(missing)} cell(s) that other jobs are doing", flush=True)
                announced = True
                time.sleep(WAIT)
                continue
            try:
                record = self._do(number, key, count)
                if record is not None:
                    self.store.write(key, record | {"options": cells[number].options})
                    self.done += 1
                    missing.remove(number)
            finally:
                if lock is not None:
                    lock.release()
        keys = dict.fromkeys(cells[number].key for number in numbers) if state.is_main_process else ()
        return [record for record in map(self.store.read, keys) if record is not None]

    def _next(self, cells: Sequence[Cell], missing: list[int]) -> tuple[int | None, FolderLock | None]:
        """The next cell to do, locked; −1: other jobs have all of them; None: all are done. Those of the loaded model come first."""
        for number in sorted(missing, key=lambda n: self.sources[n][0] is not self._loaded):
            if self._is_done(cells[number]):
                missing.remove(number)
            elif lock := self.store.lock(cells[number].key):
                if not self._is_done(cells[number]):  # done by another job just now
                    return number, lock
                lock.release()
                missing.remove(number)
        return (-1 if missing else None), None

    def _is_done(self, cell: Cell) -> bool:
        kept = range(min(self.plan.config.keep_images, cell.count))
        return self.store.read(cell.key) is not None and not missing_images(
            self._folder(cell.key), kept, cell.config.resolution
        )

    def _folder(self, key: str) -> Path:
        """Of the images of a cell that are kept."""
        return self.store.folder.with_name("images") / key

    def load(self, source: Source) -> Session:
        """The model of a source; the one before it is let go."""
        if self._loaded is not source or self._session is None:
            self._session = None
            self._session = source.load(self.plan.device, self.plan.vaes, keep=len(self.plan.sources) == 1)
            self._loaded = source
        return self._session

    def _do(self, number: int, key: str, count: int) -> Record | None:
        """Draw and score one cell. Returns what its file holds, but for its options, on the main process."""
        plan, state = self.plan, self.plan.state
        source, place = self.sources[number]
        config, scorer = source.configs[place], plan.scorers[source.ref]
        loaded, kept, folder = self.load(source).fresh(), min(plan.config.keep_images, count), self._folder(key)
        if kept:
            make_folder(folder, "--dest")
        watch = Stopwatch(images(loaded, config, range(count), state.process_index, state.num_processes), plan.device)
        with ImageWriter() as writer:

            def keeping() -> Iterator[Batch]:
                for indices, drawn in watch:
                    chosen = [i for i in indices if i < kept]
                    if chosen:
                        writer.write(folder, chosen, drawn[: len(chosen)])
                    yield indices, drawn

            figures = scorer.score(keeping(), count, f"cell {number + 1} of {len(self.sources)}")
        gflops = source.gflops[place]
        if config.core_cache:
            for other in gather_object([loaded.drawn])[1:]:
                loaded.drawn.add(other)
            sampled = loaded.with_options(config)
            gflops = cost.drawn_flops_per_step(sampled, loaded.drawn) * sampled.flow.total_steps / 1e9
        if figures is None:
            return None
        return {
            "name": source.name,
            "ckpt": source.config.ckpt,
            "ref": source.ref,
            "guide_ckpt": config.guide_ckpt,
            "figures": figures,
            "gflops_per_image": gflops,
            "ms_per_image": watch.ms_per_image,
            "num_samples": count,
            "num_ref": scorer.ref.images.count or None,
            "batch_size": config.per_proc_batch_size,
            "processes": state.num_processes,
            "device": device_name(plan.device),
            "versions": versions(),
        }


def seconds_per_image(runner: Runner, cells: Sequence[Cell]) -> list[float]:
    """Estimates of the time that one process draws an image of each cell for: by cells of this device that are done, else measured.

    Measured are one forward of a batch at the full budget, and its decoding; the rest follows from FLOPs.
    """
    device = runner.plan.device
    done = [record for record in runner.store.read_all() if record.get("device") == device_name(device)]
    if done:
        rate = sum(record["ms_per_image"] for record in done) / sum(record["gflops_per_image"] for record in done) / 1000
        return [cell.gflops * rate for cell in cells]
    source = runner.plan.sources[0]
    loaded = runner.load(source)
    config = source.configs[0]
    indices = range(config.per_proc_batch_size)
    noise, y = loaded.starting_noise(0, indices), loaded.condition(indices, device)
    latents = torch.zeros(len(indices), *loaded.shape, device=device)

    def forward() -> None:
        with torch.inference_mode(), loaded.autocast():
            loaded.flow.forward(loaded.model, noise, y, None)

    def decode() -> None:
        loaded.decode(latents)

    forward_seconds, decode_seconds = (_seconds(job, device) / len(indices) for job in (forward, decode))
    gflops = models.count_flops(loaded.model) / 1e9
    return [cell.gflops / gflops * forward_seconds + decode_seconds for cell in cells]


def _seconds(job: Any, device: torch.device) -> float:
    """Of the second of two runs."""
    job()
    cost.synchronize(device)
    start = time.perf_counter()
    job()
    cost.synchronize(device)
    return time.perf_counter() - start
