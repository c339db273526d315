#!/usr/bin/env bash
D=$(dirname "$0"); exec bash "$D/eval.sh" "$D/../train/elit_sit_xl_256.yaml" "$D/../generation/elit_sit_xl_256.yaml" "${CKPT:-exps/elit_sit_xl_256/checkpoints/0400000.pt}" "${REF:-../data/VIRTUAL_imagenet256_labeled.npz}" "$@"
