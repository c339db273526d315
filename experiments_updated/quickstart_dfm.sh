#!/usr/bin/env bash
# DFM on the quick start's digits: data → training → samples with their first stages → stages.png and the share of right digits.
# Everything goes to quickstart/ (or $1). Killed, it goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-quickstart}
CKPT=$OUT/quickstart_dfm/checkpoints/0002100.pt

bash experiments_updated/quickstart_data.sh "$OUT" four
[ -f "$CKPT" ] || accelerate launch --num_processes 1 --num_cpu_threads_per_process "$(nproc)" train.py \
    --config experiments_updated/train/quickstart_dfm.yaml --output-dir "$OUT" --data-dir "$OUT/four/train" --resume-step -1
torchrun --standalone --nproc_per_node=1 generate.py --config experiments_updated/generation/quickstart_dfm.yaml \
    --ckpt "$CKPT" --sample-dir "$OUT/samples"
python experiments_updated/quickstart_dfm_report.py --config experiments_updated/generation/quickstart_dfm.yaml \
    --ckpt "$CKPT" --sample-dir "$OUT/samples" --output-dir "$OUT"
