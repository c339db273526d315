"""Whether a GPU computes what a CPU does: velocities, gradients and whole images."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import models
from benchmarks.gpu.record import Run
from benchmarks.gpu.work import SMALL_VAE, TINY, frozen_model, session_of
from benchmarks.sampling import WIDE
from benchmarks.train_step import disturb
from common import precision
from models.layers import narrow_linears
from models.vae import load_vae
from sampling import session
from sampling.session import Session

BOUNDS = {"fp32": 1e-5, "TF32": 2e-3, "fp16": 3e-3, "bf16": 2e-2}  # of ‖difference‖ / ‖exact‖
MIXED = {"fp32": "no", "TF32": "no", "fp16": "fp16", "bf16": "bf16"}
DIFFERENT_PIXELS = 1e-3  # share of all, each by at most 1 of 255
Inputs = tuple[Tensor, Tensor, Tensor]


@contextlib.contextmanager
def computing_in(name: str, device: torch.device) -> Iterator[None]:
    """A precision of `BOUNDS`."""
    with precision.tf32(name == "TF32"), precision.autocast(MIXED[name], device):
        yield


def velocity_and_gradients(model: nn.Module, inputs: Inputs, budget: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity, and the gradients of Σ weights · velocity by all parameters, in one vector; float64 on the CPU."""
    model.zero_grad()
    v = model(*inputs, inference_budget=budget)
    with torch.autocast(v.device.type, enabled=False):
        (v.float() if v.dtype != torch.float64 else v).mul(weights).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return v.detach().double().cpu(), torch.cat([g.double().cpu().flatten() for g in gradients])


def parity(run: Run) -> None:
    """A model of full width and few blocks on the device against itself in float64 on the CPU."""
    torch.manual_seed(0)
    sizes = run.size(WIDE | {"depth": 3, "input_size": 32}, {"input_size": 8, "depth": 3, **TINY})
    model = disturb(models.create_model(f"ELIT-SiT-{run.size('XL', 'Nano')}/2", **sizes))
    side = sizes["input_size"]
    inputs = torch.randn(2, 4, side, side), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    weights = torch.randn(2, 4, side, side)
    exact_model = copy.deepcopy(model).double()
    model.to(run.device)
    for budget in run.size((1.0, 1 / 16), (1.0, 1 / 4)):
        x, t, y = inputs
        exact = velocity_and_gradients(exact_model, (x.double(), t.double(), y), budget, weights.double())
        own = x.to(run.device), t.to(run.device), y.to(run.device)
        for name, bound in BOUNDS.items():
            if name == "fp16" and not run.cuda:
                run.note(f"fp16, b = {budget:g}", {}, "needs CUDA")
                continue
            with run.attempt(f"{name}, b = {budget:g}"), computing_in(name, run.device):
                found = velocity_and_gradients(model, own, budget, weights.to(run.device))
                for what, a, b in zip(("velocity", "gradients"), found, exact, strict=True):
                    run.check(f"{what}, b = {budget:g}, {name}: relative error", ((a - b).norm() / b.norm()).item(), bound)


def draw(loaded: Session, count: int, batch: int) -> Tensor:
    """Images uint8 (count, 3, H, W) on the CPU, drawn `batch` at a time."""
    guidance, drawn = session.guidance(loaded.config), []
    for first in range(0, count, batch):
        indices = range(first, first + batch)
        with torch.no_grad():
            drawn.append(loaded.decode(loaded.latents(guidance, 0, indices, torch.tensor(indices))).cpu())
    return torch.cat(drawn)


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """Share of the values that differ, and by how much at most."""
    distance = (a.int() - b.int()).abs()
    return {"share": (distance > 0).double().mean().item(), "largest": distance.max().item()}


def sets(run: Run) -> None:
    """The same images in batches of 8 and of 2, and by the CPU."""
    count, side, name = run.size((8, 32, "ELIT-SiT-S/2"), (4, 8, "ELIT-SiT-Nano/2"))
    on_cpu = frozen_model(Run(run.tiny, run.folder), name, side).cpu()
    options = {"model": name, "resolution": 4 * side, "num_steps": run.size(10, 2), "cfg_scale": 2.0, "cuda_graphs": False}
    shape, references = (4, side, side), {}
    vaes = {device: load_vae(str(SMALL_VAE), device)[0] for device in {run.device, torch.device("cpu")}}
    with computing_in("fp32", torch.device("cpu")):
        references["the CPU"] = draw(session_of(on_cpu, vaes[torch.device("cpu")], shape, **options), count, count)
    for kind in ("fp32", "TF32", "bf16"):
        with run.attempt(f"{kind}: images"), precision.tf32(kind == "TF32"):
            dtype = precision.AMP_TYPES[MIXED[kind]]
            model = narrow_linears(copy.deepcopy(on_cpu), dtype).to(run.device)
            loaded = session_of(model, vaes[run.device], shape, **options, mixed_precision=MIXED[kind])
            whole = draw(loaded, count, count)
            others = {f"batches of {count // 4}": draw(loaded, count, count // 4), **references}
            for other, images in others.items():
                found = difference(whole, images)
                if kind != "fp32":
                    run.note(f"{kind} against {other}", found)
                    continue
                run.check(f"{kind} against {other}: share of other pixels", found["share"], DIFFERENT_PIXELS)
                run.check(f"{kind} against {other}: largest difference", found["largest"], 1)
            if kind == "fp32":
                references["fp32"] = whole
