#!/usr/bin/env bash
# A checkpoint's figures: a thin call of sweep.py. Tables, plots and cells go to results/ (sweep.csv, sweep.md, …).
#
#   eval.sh [--clean] TRAIN_CONFIG GENERATION_CONFIG CKPT REF [BUDGETS…]
#
# Without BUDGETS: those of the variable BUDGETS, else the generation config's. NPROC: processes (default: the number of GPUs);
# RESULTS: another folder than results; GENERATE, EVALUATE: more options of sampling and evaluation, which sweep.py takes with
# several values, too (GENERATE="--cfg-scale 1 1.5 4"). --clean keeps no images. Labels are random, as in generate.py;
# text models draw from the prompts of GENERATION_CONFIG or GENERATE.
#
# Run again, it resumes: what has been made from the same checkpoint, reference and options is not made again.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ARGS=() KEEP=10000000
for argument; do if [ "$argument" = --clean ]; then KEEP=0; else ARGS+=("$argument"); fi; done
set -- "${ARGS[@]}"
fail() { echo "eval.sh: error: $*" >&2; exit 2; }
[ $# -ge 4 ] || fail "give TRAIN_CONFIG GENERATION_CONFIG CKPT REF [BUDGETS…]"
TRAIN=$1 GENERATION=$2 CKPT=$3 REF=$4; shift 4
for file in "$TRAIN" "$GENERATION"; do [ -f "$file" ] || fail "$file: no such config file"; done
# Neither a file nor hf://owner/repo/file: the name of released weights, which has no / and no ending.
[ -e "$CKPT" ] || [[ $CKPT == hf://* || $CKPT != *[/.]* ]] || fail "$CKPT: no such checkpoint"
[ -e "$REF" ] || fail "$REF: no such reference; ADM's are at https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz and …/imagenet/512/VIRTUAL_imagenet512.npz"
[ $# -gt 0 ] || { read -ra budgets <<<"${BUDGETS:-}"; set -- ${budgets[@]+"${budgets[@]}"}; }
NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
read -ra GENERATE <<<"${GENERATE:-}"
read -ra EVALUATE <<<"${EVALUATE:-}"
LABELS=(--class-labels random)
if grep -Eq '^prompts?:' "$GENERATION" || [[ " ${GENERATE[*]:-}" =~ \ --(prompt|class[-_]labels) ]]; then LABELS=(); fi
exec torchrun --standalone --nproc_per_node=$((NPROC > 0 ? NPROC : 1)) "$ROOT/sweep.py" --train-config "$TRAIN" --config "$GENERATION" \
    --ckpt "$CKPT" --ref "$REF" --dest "${RESULTS:-results}" --keep-images "$KEEP" ${LABELS[@]+"${LABELS[@]}"} \
    ${1:+--inference-budget "$@"} ${GENERATE[@]+"${GENERATE[@]}"} ${EVALUATE[@]+"${EVALUATE[@]}"}
