#!/usr/bin/env bash
# Real digits → VAE latents → one elastic model → samples at three compute budgets → budgets.png and a table.
# Everything goes to quickstart/ (or $1). Killed at any point, it goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-quickstart}
CKPT=$OUT/quickstart/checkpoints/0001800.pt
START=$SECONDS
say() { echo "[$((SECONDS - START)) s] $*"; }

say "data: canvases of four digits"
bash experiments_updated/quickstart_data.sh "$OUT"

say "training"
[ -f "$CKPT" ] || accelerate launch --num_processes 1 --num_cpu_threads_per_process "$(nproc)" train.py \
    --config experiments_updated/train/quickstart.yaml --output-dir "$OUT" --data-dir "$OUT/data/train" --resume-step -1

for budget in 0.0625 0.25 1.0; do
    say "sampling at budget $budget"
    torchrun --standalone --nproc_per_node=1 generate.py --config experiments_updated/generation/quickstart.yaml \
        --ckpt "$CKPT" --sample-dir "$OUT/samples" --inference-budget "$budget"
done

say "measuring"
python experiments_updated/quickstart_report.py --ckpt "$CKPT" --config experiments_updated/generation/quickstart.yaml \
    --sample-dir "$OUT/samples" --val-data-dir "$OUT/data/val" --output-dir "$OUT"
say "done: $OUT/budgets.png, $OUT/table.md"
