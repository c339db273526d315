# Sourced by the studies: the quick start's data, training of models that the studies share, and the report.
# STEPS=n: another length of training. SEEDS="0 1": the seeds. RUNS=FOLDER: where models are kept. Killed, a study goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
STUDY=$(basename "$0" .sh) OUT=${1:-quickstart} STEPS=${STEPS:-400} SEEDS=${SEEDS:-0 1}
RUNS=${RUNS:-$OUT/studies-$STEPS} RESULTS=${RESULTS:-experiments_updated/studies/results}
ALL=(--elit-min-mask-prob 0 --elit-max-mask-prob 0.9375) # all 16 budgets
START=$SECONDS
say() { echo "[$((SECONDS - START)) s] $*"; }

train() { # NAME OPTION…: a model of each seed, in $RUNS/NAME-SEED
    local seed
    for seed in $SEEDS; do
        [ -f "$RUNS/$1-$seed/checkpoints/$(printf %07d "$STEPS").pt" ] && continue
        say "training $1, seed $seed"
        python train.py --config experiments_updated/studies/digits.yaml --data-dir "$OUT/data/train" --output-dir "$RUNS" \
            --max-train-steps "$STEPS" --checkpointing-steps "$(((STEPS + 3) / 4))" --resume-step -1 \
            --exp-name "$1-$seed" --seed "$seed" "${@:2}"
    done
}

quickstart() { # the study's models are the quick start's, trained first where they are not there; CKPT: that for all budgets
    [ -f "$OUT/table.md" ] || bash experiments_updated/quickstart.sh "$OUT"
    CKPT=$(find "$OUT/quickstart/checkpoints" -name '*.pt' | sort | tail -1) RUNS=$OUT
}

report() { # NAME…: the table and picture of the study from these models
    say "measuring"
    python experiments_updated/studies/report.py --study "$STUDY" --models "$@" --runs "$RUNS" --val-data-dir "$OUT/data/val" \
        --output-dir "$RESULTS"
    say "done: $RESULTS/$STUDY.json, $STUDY.md"
}

bash experiments_updated/quickstart_data.sh "$OUT"
