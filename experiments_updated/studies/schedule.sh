#!/usr/bin/env bash
# Budgets over time: half the latents while noise is high, in training and in sampling.
. "$(dirname "$0")/common.sh"
train elit --model ELIT-SiT-Ti/2
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
train scheduled --model ELIT-SiT-Ti/2 --elit-budget-schedule 0.5@1.0-0.5,1.0@0.5-0.0
report elit elit-all scheduled
