#!/usr/bin/env bash
# Real digits → VAE latents → one elastic model, and a plain one for the same compute → samples at three compute budgets →
# budgets.png and a table. Everything goes to quickstart/ (or $1). Killed at any point, it goes on from there.
# Trainings and samplings run two at a time, one thread each, so that results do not depend on the number of cores.
# SEED=1: another training.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-quickstart}
ELIT=$OUT/quickstart/checkpoints/0002700.pt
SIT=$OUT/quickstart_sit/checkpoints/0001980.pt
SAMPLES=(--config experiments_updated/generation/quickstart.yaml --sample-dir "$OUT/samples")
UNGUIDED=720 # canvases of each model and budget without guidance: half the cost, and what a budget buys shows more clearly
START=$SECONDS
say() { echo "[$((SECONDS - START)) s] $*"; }
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

train() { # CONFIG CHECKPOINT
    [ -f "$2" ] || accelerate launch --num_processes 1 --num_cpu_threads_per_process 1 train.py --config "$1" \
        --output-dir "$OUT" --data-dir "$OUT/data/train" --resume-step -1 --seed "${SEED:-0}"
}
sample() { OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=1 generate.py "${SAMPLES[@]}" "$@"; }
together() { # COMMAND…: with the job in the background, whose failure is shown
    local other=$!
    "$@"
    wait "$other" || { cat "$OUT/background.log" >&2 && exit 1; }
}

say "data: canvases of four digits"
bash experiments_updated/quickstart_data.sh "$OUT"

say "training; the plain model's progress is in $OUT/background.log"
train experiments_updated/train/quickstart_sit.yaml "$SIT" >"$OUT/background.log" 2>&1 &
together train experiments_updated/train/quickstart.yaml "$ELIT"

say "sampling"
for guidance in "" "--cfg-scale 1 --num-fid-samples $UNGUIDED"; do
    # shellcheck disable=SC2086  # two options, or none
    sample --ckpt "$SIT" $guidance >"$OUT/background.log" 2>&1 &
    together sample --ckpt "$ELIT" --inference-budget 1.0 $guidance
    sample --ckpt "$ELIT" --inference-budget 0.25 $guidance >"$OUT/background.log" 2>&1 &
    together sample --ckpt "$ELIT" --inference-budget 0.0625 $guidance
done
sample --ckpt "$ELIT" --inference-budget 1.0 --unconditional-inference-budget 0.0625

say "measuring"
python experiments_updated/quickstart_report.py "${SAMPLES[@]}" --ckpt "$ELIT" --baseline-ckpt "$SIT" \
    --val-data-dir "$OUT/data/val" --output-dir "$OUT" --unguided-samples "$UNGUIDED"
say "done: $OUT/budgets.png, $OUT/table.md"
