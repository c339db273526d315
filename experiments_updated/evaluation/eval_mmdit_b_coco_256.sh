#!/usr/bin/env bash
D=$(dirname "$0"); exec bash "$D/eval.sh" "$D/../train/mmdit_b_coco_256.yaml" "$D/../generation/coco_256.yaml" "${CKPT:-exps/mmdit_b_coco_256/checkpoints/0150000.pt}" "${REF:-../data/coco256_val/images}" "$@"
