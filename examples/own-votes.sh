#!/usr/bin/env bash
# Your own votes to a LoRA. Two models (or a model and a LoRA of it) make images for your prompts, people choose,
# and the base model learns from their choices.
#   MODEL=... TUNED=other=LORA PROMPTS=prompts.txt bash examples/own-votes.sh
# Votes from elsewhere: VOTES=table.csv, with a row a pair and COLUMNS=prompt=...,image_0=...,image_1=...,label=...
set -euo pipefail
: "${MODEL:?name the model that is to learn}"
OUT=${OUT:-own-votes}
VOTES=${VOTES:-$OUT/votes.parquet}
if [ ! -e "$VOTES" ]; then
  : "${TUNED:?name what is compared with the model: NAME=CHECKPOINT}" "${PROMPTS:?name a file with prompts}"
  fifa evaluate --base "$MODEL" --tuned "$TUNED" --prompts "$PROMPTS" --score none --seeds 2 --out "$OUT/images"
  echo "share the link that comes now; end with Ctrl-C when there are enough votes" >&2
  fifa vote "$OUT/images" --checks 0.05 --repeats 0.1 || true
  fifa vote results "$OUT/images"
  fifa vote export "$OUT/images" --out "$VOTES"
fi
# Few pairs: all that are no ties, in the order of their margins by a reward model that was trained on them.
fifa read "$VOTES" ${COLUMNS:+--columns "$COLUMNS"} --explain
fifa filter "$VOTES" ${COLUMNS:+--columns "$COLUMNS"} --margin "${MARGIN:-proxy}" --quality none --diversity none \
  --anyway --keep "${KEEP:-100%}" --out "$OUT/run"
read -ra train <<<"${TRAIN:---preset lora-small --holdout 0.1 --stop}"
fifa train "$OUT/run" --model "$MODEL" "${train[@]}" --out "$OUT/lora"
