#!/usr/bin/env bash
# Does Read attend to what is difficult? Its attention to each patch against the patch's loss, of models trained at one and at all budgets.
. "$(dirname "$0")/common.sh"
train elit --model ELIT-SiT-Ti/2
train elit-all --model ELIT-SiT-Ti/2 "${ALL[@]}"
report elit elit-all
