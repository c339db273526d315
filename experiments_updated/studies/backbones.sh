#!/usr/bin/env bash
# U-ViT, HDiT and the ELIT paper's two layouts, each with and without ELIT, trained alike on the quick start's digits
# → held-out loss and FID of each at three budgets: table.md, results.json and samples.png in quickstart/backbones-240/.
# Everything goes to quickstart/ (or $1), whose data are used where the quick start has made them. Killed, it goes on from there.
# STEPS=n trains for n steps in place of 240.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-quickstart} STEPS=${STEPS:-240}
STUDY=$OUT/backbones-$STEPS
START=$SECONDS
say() { echo "[$((SECONDS - START)) s] $*"; }

bash experiments_updated/quickstart_data.sh "$OUT"
for model in U-ViT-Ti/2 HDiT-Ti/1 SiT-UViT-Ti/2 SiT-HDiT-Ti/2; do
    for name in "$model" "ELIT-$model"; do
        run=${name/\//-}
        ckpt=$STUDY/$run/checkpoints/$(printf %07d "$STEPS").pt
        options=()
        [[ $name != *HDiT-Ti/1 ]] || options+=(--levels 2) # of 16×16 and 8×8 tokens; by itself it has one, of 16×16
        [[ $name != ELIT-* ]] || options+=(--elit-min-mask-prob 0 --elit-max-mask-prob 0.9375) # all 16 budgets
        say "training $name"
        [ -f "$ckpt" ] || python train.py --config experiments_updated/studies/backbones.yaml --model "$name" --exp-name "$run" \
            --output-dir "$STUDY" --data-dir "$OUT/data/train" --max-train-steps "$STEPS" --resume-step -1 "${options[@]}"
        say "sampling and measuring $name"
        [ -f "$STUDY/$run.json" ] || python experiments_updated/studies/backbones_report.py --ckpt "$ckpt" \
            --config experiments_updated/studies/backbones_sampling.yaml --sample-dir "$STUDY/samples" \
            --val-data-dir "$OUT/data/val" --output-dir "$STUDY"
    done
done
say "done: $STUDY/table.md, $STUDY/samples.png"
