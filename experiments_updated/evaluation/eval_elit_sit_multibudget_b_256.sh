#!/usr/bin/env bash
D=$(dirname "$0"); BUDGETS=${BUDGETS-0.0625 0.25 0.5 1.0} exec bash "$D/eval.sh" "$D/../train/elit_sit_b_256_multibudget.yaml" "$D/../generation/elit_sit_b_256.yaml" "${CKPT:-exps/elit_sit_b_256_multibudget/checkpoints/0400000.pt}" "${REF:-../data/VIRTUAL_imagenet256_labeled.npz}" "$@"
