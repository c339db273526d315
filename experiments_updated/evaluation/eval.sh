#!/usr/bin/env bash
# Samples from a checkpoint → ADM's figures → one line in results/summary.csv and results/summary.md.
#
#   eval.sh [--clean] TRAIN_CONFIG GENERATION_CONFIG CKPT REF [BUDGETS…]
#
# Without BUDGETS: those of the variable BUDGETS, else the generation config's. Stopped anywhere, it goes on where it was; a set
# whose figures (results/evaluation/…json) are newer than checkpoint, reference and config is not made again. --clean removes the
# images once their figures are written. NPROC: processes (default: the number of GPUs); RESULTS: another folder than results;
# GENERATE, EVALUATE: more options of generate.py and evaluate.py.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ARGS=() CLEAN=
for argument; do if [ "$argument" = --clean ]; then CLEAN=1; else ARGS+=("$argument"); fi; done
set -- "${ARGS[@]}"
fail() { echo "eval.sh: error: $*" >&2; exit 2; }
[ $# -ge 4 ] || fail "give TRAIN_CONFIG GENERATION_CONFIG CKPT REF [BUDGETS…]"
TRAIN=$1 GENERATION=$2 CKPT=$3 REF=$4; shift 4
for file in "$TRAIN" "$GENERATION"; do [ -f "$file" ] || fail "$file: no such config file"; done
[ -f "$CKPT" ] || [[ $CKPT == hf://* ]] || fail "$CKPT: no such checkpoint"
[ -e "$REF" ] || fail "$REF: no such reference; ADM's are at https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz and …/imagenet/512/VIRTUAL_imagenet512.npz"
RESULTS=${RESULTS:-results}
NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
read -ra GENERATE <<<"${GENERATE:-}"
read -ra EVALUATE <<<"${EVALUATE:-}"
run() { torchrun --standalone --nproc_per_node=$((NPROC > 0 ? NPROC : 1)) "$@"; }

[ $# -gt 0 ] || { read -ra budgets <<<"${BUDGETS:-}"; set -- "${budgets[@]:-}"; }
for budget; do
    name=$(basename "$TRAIN" .yaml)/$(basename "$GENERATION" .yaml)-$(basename "${CKPT%.*}")${budget:+-budget-$budget}
    metrics=$RESULTS/evaluation/$name.json
    echo "== $name"
    if ! [ "$metrics" -nt "$REF" ] || ! [ "$metrics" -nt "$GENERATION" ] || { [ -f "$CKPT" ] && ! [ "$metrics" -nt "$CKPT" ]; }; then
        said=$(run "$ROOT/generate.py" --train-config "$TRAIN" --eval-config "$GENERATION" --ckpt "$CKPT" --sample-dir "$RESULTS" \
            ${budget:+--inference-budget "$budget"} ${GENERATE[@]+"${GENERATE[@]}"} | tee >(cat >&2))
        folder=$(sed -n 's/^\(.*\): [0-9]* images drawn.*\.npz beside it$/\1/p' <<<"$said")
        run "$ROOT/evaluate.py" "$REF" "$folder.npz" --output "$metrics" ${EVALUATE[@]+"${EVALUATE[@]}"}
        if [ -n "$CLEAN" ]; then rm -r "$folder" "$folder.npz"; fi
    fi
    python "$ROOT/experiments_updated/evaluation/summary.py" "$metrics" --dest "$RESULTS"
done
