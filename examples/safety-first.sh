#!/usr/bin/env bash
# Safety first: prompts are rated by a large model of yours, every flag drops a pair (as always), and so does a low rating; what
# is left trains the model; images for unsafe prompts are counted before and after.
#   SOURCE=... MODEL=... PROMPTS=prompts.csv \
#     QUALITY=openai:MODEL@http://localhost:8000/v1 bash examples/safety-first.sh
# PROMPTS has a column `category`; those in it called `unsafe` ask for what should not be shown.
set -euo pipefail
: "${SOURCE:?name the feedback}" "${MODEL:?name the model}" "${PROMPTS:?name the test prompts}"
OUT=${OUT:-safety-first}
fifa filter "$SOURCE" --margin "${MARGIN:-pickscore}" \
  --quality "${QUALITY:-local}" --diversity "${DIVERSITY:-minilm}" \
  ${MIN_QUALITY:+--min-quality "$MIN_QUALITY"} \
  --keep "${KEEP:-5000}" --out "$OUT/run"
# How many pairs each reason dropped
fifa info "$OUT/run" --json
read -ra train <<<"${TRAIN:---preset lora-small --draws 2}"
fifa train "$OUT/run" --model "$MODEL" "${train[@]}" --out "$OUT/lora"
detector=(--detector "${SAFETY:-Falconsai/nsfw_image_detection}" --unsafe-labels "${UNSAFE:-nsfw}")
if [ "${SAFETY:-}" = none ]; then detector=(); fi
read -ra evaluate <<<"${EVALUATE:---limit 200 --seeds 4}"
fifa evaluate --base "$MODEL" --tuned lora="$OUT/lora" --prompts "$PROMPTS" --score "${SCORER:-hpsv2.1}" \
  "${detector[@]}" --unsafe-categories unsafe "${evaluate[@]}" --out "$OUT/run"
