#!/usr/bin/env bash
# How many pairs are enough? The scores of one run, selected again at five budgets: seconds each, nothing is scored
# twice. With MODEL and PROMPTS it trains on each for the same number of steps, and compares them in one page.
#   RUN=... MODEL=... PROMPTS=prompts.txt bash examples/budgets.sh
set -euo pipefail
: "${RUN:?name a run of fifa filter}"
OUT=${OUT:-budgets}
tuned=()
for keep in ${BUDGETS:-500 1000 2000 5000 10000}; do
  run=$OUT/$keep
  if [ ! -d "$run" ]; then mkdir -p "$OUT" && cp -r "$RUN" "$run" && rm -rf "$run/subset" "$run/evaluate"; fi
  fifa select "$run" --keep "$keep"
  fifa export "$run"
  if [ -n "${MODEL:-}" ]; then
    read -ra train <<<"${TRAIN:---preset lora-small --draws 2 --steps 1000}"
    fifa train "$run" --model "$MODEL" "${train[@]}" --out "$OUT/lora-$keep"
    tuned+=(--tuned "keep-$keep=$OUT/lora-$keep")
  fi
done
if [ -n "${MODEL:-}" ]; then
  read -ra evaluate <<<"${EVALUATE:---limit 100 --seeds 4}"
  fifa evaluate --base "$MODEL" "${tuned[@]}" --prompts "${PROMPTS:?name a file with test prompts}" \
    --score "${SCORER:-hpsv2.1}" "${evaluate[@]}" --out "$OUT/images"
fi
