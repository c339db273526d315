#!/usr/bin/env bash
# Fewer latents or fewer steps? A sweep over both, and over the core cache, of a model trained at all 16 budgets.
. "$(dirname "$0")/common.sh"
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
DIGIT_CLASSIFIER=$RUNS/classifier.pt python sweep.py --ckpt "$RUNS/elit-all-${SEEDS%% *}/checkpoints/$(printf %07d "$STEPS").pt" \
    --ref "$OUT/data/val/images" --features experiments_updated.digit_classifier:factory --metrics fid --num-fid-samples 200 \
    --cfg-scale 1.5 --inference-budget 0.0625 0.25 1 --num-steps 5 10 20 --core-cache none 0.5 --dest "$RUNS/steps"
cp "$RUNS/steps/fid_vs_gflops.png" experiments_updated/studies/results/steps.png
cp "$RUNS/steps/sweep.md" experiments_updated/studies/results/steps.md
