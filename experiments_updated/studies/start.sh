#!/usr/bin/env bash
# What makes the budget matter in a short run? The quick start's model, and the same with the published start of Read and Write.
. "$(dirname "$0")/common.sh"
quickstart
python train.py --config experiments_updated/train/quickstart.yaml --elit-init published --exp-name published_start \
    --data-dir "$OUT/data/train" --output-dir "$OUT" --resume-step -1
report quickstart published_start
