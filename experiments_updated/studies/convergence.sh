#!/usr/bin/env bash
# Does ELIT learn faster? The plain transformer, ELIT at the full budget, at all 16 budgets, and at one smaller budget each.
. "$(dirname "$0")/common.sh"
train sit --model SiT-Ti/2
train elit --model ELIT-SiT-Ti/2
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
train elit-4th --model ELIT-SiT-Ti/2 --elit-max-mask-prob 0.75
train elit-16th --model ELIT-SiT-Ti/2 --elit-max-mask-prob 0.9375
report sit elit elit-all elit-4th elit-16th
