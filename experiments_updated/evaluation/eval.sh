#!/usr/bin/env bash
# Samples from a checkpoint → ADM's figures → one line in results/summary.csv and results/summary.md.
#
#   eval.sh [--clean] TRAIN_CONFIG GENERATION_CONFIG CKPT REF [BUDGETS…]
#
# Without BUDGETS: those of the variable BUDGETS, else the generation config's. NPROC: processes (default: the number of GPUs);
# RESULTS: another folder than results; GENERATE, EVALUATE: more options of generate.py and evaluate.py. --clean removes the
# images once their figures are written.
#
# Run again, it resumes. Images and figures are named by a hash of all that decides them: the contents of configs, checkpoint and
# reference, and the options. What has the same hash is not made again; dates and file names decide nothing.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ARGS=() CLEAN=
for argument; do if [ "$argument" = --clean ]; then CLEAN=1; else ARGS+=("$argument"); fi; done
set -- "${ARGS[@]}"
fail() { echo "eval.sh: error: $*" >&2; exit 2; }
[ $# -ge 4 ] || fail "give TRAIN_CONFIG GENERATION_CONFIG CKPT REF [BUDGETS…]"
TRAIN=$1 GENERATION=$2 CKPT=$3 REF=$4; shift 4
for file in "$TRAIN" "$GENERATION"; do [ -f "$file" ] || fail "$file: no such config file"; done
[ -e "$CKPT" ] || [[ $CKPT == hf://* ]] || fail "$CKPT: no such checkpoint"
[ -e "$REF" ] || fail "$REF: no such reference; ADM's are at https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz and …/imagenet/512/VIRTUAL_imagenet512.npz"
RESULTS=${RESULTS:-results}
NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
read -ra GENERATE <<<"${GENERATE:-}"
read -ra EVALUATE <<<"${EVALUATE:-}"
# Content of a file or of all files of a folder → its hash; of anything else (hf://…) the text itself.
content() { if [ -e "$1" ]; then (cd "$(dirname "$1")" && find "$(basename "$1")" -type f -print0 | sort -z | xargs -0 sha256sum); else echo "$1"; fi; }
key() { sha256sum | cut -c1-12; }
run() { torchrun --standalone --nproc_per_node=$((NPROC > 0 ? NPROC : 1)) "$@"; }

made_of=$(content "$TRAIN" && content "$GENERATION" && content "$CKPT") reference=$(content "$REF")

[ $# -gt 0 ] || { read -ra budgets <<<"${BUDGETS:-}"; set -- "${budgets[@]:-}"; }
for budget; do
    name=$(basename "$TRAIN" .yaml)/$(basename "$GENERATION" .yaml)-$(basename "${CKPT%.*}")${budget:+-budget-$budget}
    images=$(key <<<"$made_of $budget ${GENERATE[*]-}")
    metrics=$RESULTS/evaluation/$name-$(key <<<"$images $reference ${EVALUATE[*]-}").json
    echo "== $name"
    if ! [ -f "$metrics" ]; then
        message=$(run "$ROOT/generate.py" --train-config "$TRAIN" --eval-config "$GENERATION" --ckpt "$CKPT" \
            --sample-dir "$RESULTS/samples/$images" ${budget:+--inference-budget "$budget"} ${GENERATE[@]+"${GENERATE[@]}"} | tee >(cat >&2))
        folder=$(sed -n 's/^\(.*\): [0-9]* images drawn.*\.npz beside it$/\1/p' <<<"$message")
        run "$ROOT/evaluate.py" "$REF" "$folder.npz" --output "$metrics" ${EVALUATE[@]+"${EVALUATE[@]}"}
        if [ -n "$CLEAN" ]; then rm -r "$folder" "$folder.npz"; fi
    fi
    python "$ROOT/experiments_updated/evaluation/summary.py" "$metrics" --dest "$RESULTS"
done
