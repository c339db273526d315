#!/usr/bin/env bash
D=$(dirname "$0"); exec bash "$D/eval.sh" "$D/../train/dfm_sit_xl_512.yaml" "$D/../generation/dfm_sit_xl_512.yaml" "${CKPT:-exps/dfm_sit_xl_512/checkpoints/0400000.pt}" "${REF:-../data/VIRTUAL_imagenet512.npz}" "$@"
