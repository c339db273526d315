#!/usr/bin/env bash
# Fewer latents or fewer steps? A sweep over both, and over the core cache, of the quick start's model.
. "$(dirname "$0")/common.sh"
quickstart
export DIGIT_CLASSIFIER=$OUT/classifier.pt
python sweep.py --ckpt "$CKPT" --ref "$OUT/data/val/images" --features experiments_updated.digit_classifier:factory \
    --metrics fid --num-fid-samples "${SAMPLES:-100}" --cfg-scale 1.5 --inference-budget 0.0625 0.25 1 --num-steps 5 10 20 \
    --core-cache 0 0.2 --dest "$OUT/steps"
cp "$OUT/steps/fid_vs_gflops.png" "$RESULTS/steps.png"
cp "$OUT/steps/sweep.md" "$RESULTS/steps.md"
cp "$OUT/steps/sweep.csv" "$RESULTS/steps.csv"
