#!/usr/bin/env bash
# Captioned digits → VAE latents and MiniLM text features → one elastic text-to-image model → what it draws for prompts at three
# compute budgets → text_budgets.png and a table. Everything goes to quickstart_text/ (or $1). Killed at any point, it goes on
# from there. Two processes of one thread each train and sample, so that results do not depend on the number of cores.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-quickstart_text}
ENCODER=${ENCODER:-minilm}
CKPT=$OUT/quickstart_text/checkpoints/0001800.pt
DATA=$OUT/data
SAMPLES=(--ckpt "$CKPT" --prompts "$DATA/prompts.txt" --sample-dir "$OUT/samples" --cfg-scale 3 --num-steps 20 --per-proc-batch-size 24)
START=$SECONDS
say() { echo "[$((SECONDS - START)) s] $*"; }
two() { OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 "$@"; }

say "data: canvases of four different digits and their captions"
[ -d "$DATA" ] || { python dataset_tools.py demo --captions --dest "$DATA.partial" && mv "$DATA.partial" "$DATA"; }
for split in train val; do
    [ -f "$DATA/$split/vae-sd/dataset.json" ] || two dataset_tools.py encode --source="$DATA/$split/images" \
        --dest="$DATA/$split/vae-sd" --model-url=experiments_updated/quickstart_vae
    [ -f "$DATA/$split/text/text.json" ] || two dataset_tools.py text --source="$DATA/$split" --encoder="$ENCODER" --length=24
done

say "training"
[ -f "$CKPT" ] || two train.py --config experiments_updated/train/quickstart_text.yaml --output-dir "$OUT" \
    --data-dir "$DATA/train" --resume-step -1

say "sampling"
for budget in 1.0 0.25 0.0625; do
    two generate.py "${SAMPLES[@]}" --inference-budget "$budget"
done

say "measuring"
python experiments_updated/quickstart_text_report.py "${SAMPLES[@]}" --output-dir "$OUT"
say "done: $OUT/text_budgets.png, $OUT/text_table.md"
