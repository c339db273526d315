"""ADM's own published pair: within which tolerance do the figures fall?

    python benchmarks/adm_check.py VIRTUAL_imagenet256_labeled.npz admnet_guided_upsampled_imagenet256.npz WEIGHTS

Both files are at https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/; WEIGHTS: Inception in
torch-fidelity's format.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import cli_main
from config.tool_options import EvaluateConfig
from metrics.evaluation import evaluate, start_processes

PUBLISHED = {  # by ADM's evaluator; how far another framework may be off
    "is": (215.84, 0.2),
    "fid": (3.9426, 0.005),
    "sfid": (6.1404, 0.005),
    "precision": (0.8265, 0.002),
    "recall": (0.5309, 0.002),
}


@cli_main
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ref", "samples", "weights"):
        parser.add_argument(name)
    options = parser.parse_args(argv)
    config = EvaluateConfig(ref=options.ref, samples=options.samples, inception_weights=options.weights)
    state = start_processes()
    found = evaluate(config, state, print)
    if found is not None:
        print(f"{'figure':10} {'found':>10} {'published':>10} {'off by':>8} {'allowed':>8}")
        for name, (published, allowed) in PUBLISHED.items():
            off = found[name] - published
            verdict = "ok" if abs(off) <= allowed else "MISSED"
            print(f"{name:10} {found[name]:10.4f} {published:10.4f} {off:+8.4f} {allowed:8.3f} {verdict}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
