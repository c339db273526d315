#!/usr/bin/env bash
# Where does compute go (the paper's Figure 2)? Every canvas with its patches spread over a grid of four times the tokens, zeros
# between them: does the plain transformer gain by the empty tokens, does ELIT? And by as many tokens that are not empty?
. "$(dirname "$0")/common.sh"
SPREAD=$RUNS/spread
for split in train val; do
    python experiments_updated/studies/spread.py --source "$OUT/data/$split" --dest "$SPREAD/$split"
done
train sit --model SiT-Ti/2
train elit --model ELIT-SiT-Ti/2
train sit-synth --model SiT-Ti/2 --data-dir "$SPREAD/train" --resolution 128
train elit-synth --model ELIT-SiT-Ti/2 --data-dir "$SPREAD/train" --resolution 128
train sit-fine --model SiT-Ti/1
train elit-fine --model ELIT-SiT-Ti/1
report sit elit sit-synth elit-synth sit-fine elit-fine
