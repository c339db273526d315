#!/usr/bin/env bash
# One model for all budgets, or one for each? The plain transformer, ELIT at all 16 budgets, and at one budget each, of two seeds.
. "$(dirname "$0")/common.sh"
train sit --model SiT-Ti/2
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
train elit --model ELIT-SiT-Ti/2
train elit-4th --model ELIT-SiT-Ti/2 --elit-max-mask-prob 0.75
train elit-16th --model ELIT-SiT-Ti/2 --elit-max-mask-prob 0.9375
report sit elit-all elit elit-4th elit-16th
