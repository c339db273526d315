#!/usr/bin/env bash
# Are latents ordered by importance? The first, the last and random ones of a model trained at all 16 budgets.
. "$(dirname "$0")/common.sh"
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
report elit-all
python elit_multibudget_inference.py --ckpt "$RUNS/elit-all-${SEEDS%% *}/checkpoints/$(printf %07d "$STEPS").pt" --class-label 2 5 8 \
    --budgets 0.0625 1 --num-steps 20 --attention --output-dir "$RUNS/order"
cp "$RUNS/order/attention_maps.png" experiments_updated/studies/results/order_attention.png
