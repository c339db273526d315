#!/usr/bin/env bash
# The quick starts' data: digits → canvases of kind $2 → VAE latents, in $1/$2/train and $1/$2/val. What is there already stays.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$1/$2
[ -d "$OUT/digits" ] || { python dataset_tools.py demo --canvas "$2" --dest "$OUT/digits.partial" && mv "$OUT/digits.partial" "$OUT/digits"; }
for split in train val; do
    data=$OUT/$split
    [ -f "$data/images/dataset.json" ] || python dataset_tools.py convert --source="$OUT/digits/$split" --dest="$data/images" --resolution=64x64
    [ -f "$data/vae-sd/dataset.json" ] || python dataset_tools.py encode --source="$data/images" --dest="$data/vae-sd" \
        --model-url=experiments_updated/quickstart_vae
done
