#!/usr/bin/env bash
# How many blocks before Read and after Write? Which Write, which tail, how wide an MLP? All models at all 16 budgets.
. "$(dirname "$0")/common.sh"
train sit --model SiT-Ti/2
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
train split-242 --model ELIT-SiT-Ti/2 "${ALL[@]}" --head-depth 2 --tail-depth 2
train split-323 --model ELIT-SiT-Ti/2 "${ALL[@]}" --head-depth 3 --tail-depth 3
train write-paper --model ELIT-SiT-Ti/2 "${ALL[@]}" --elit-write paper
train mlp-4 --model ELIT-SiT-Ti/2 "${ALL[@]}" --elit-mlp-ratio 4
train tail-skip --model ELIT-SiT-Ti/2 "${ALL[@]}" --elit-tail skip
report sit elit-all split-242 split-323 write-paper mlp-4 tail-skip
