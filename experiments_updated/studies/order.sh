#!/usr/bin/env bash
# Are latents ordered by importance? The first, the last and random ones of the quick start's model, and what they read.
. "$(dirname "$0")/common.sh"
quickstart
report quickstart
python elit_multibudget_inference.py --ckpt "$CKPT" --class-label 2 5 8 --budgets 0.0625 1 --num-steps 20 --attention \
    --output-dir "$OUT/order"
cp "$OUT/order/attention_maps.png" "$RESULTS/order_attention.png"
