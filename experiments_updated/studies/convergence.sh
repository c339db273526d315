#!/usr/bin/env bash
# Does ELIT learn faster? SiT, ELIT at full budget and at all 16, of two seeds: held-out loss and FID against steps and FLOPs.
. "$(dirname "$0")/common.sh"
train sit --model SiT-Ti/2
train elit --model ELIT-SiT-Ti/2
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
report sit elit elit-all
