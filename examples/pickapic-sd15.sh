#!/usr/bin/env bash
# Pick-a-Pic v2 to a LoRA for Stable Diffusion 1.5, on one card with 24 GB. docs/walkthroughs.md has what each
# step takes. Every step can be stopped and started again.
#   SOURCE=/data/pickapic_v2 PROMPTS=prompts.txt bash examples/pickapic-sd15.sh
set -euo pipefail
: "${SOURCE:?name a copy of Pick-a-Pic v2 with its images: a folder, or hf://datasets/OWNER/NAME}"
: "${PROMPTS:?name a file with test prompts, one a line}"
MODEL=${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}
OUT=${OUT:-pickapic-sd15}

# 1. Is the set read as it should be? Is a margin by PickScore of use on it? (300 pairs)
fifa read "$SOURCE" --explain
fifa trust "$SOURCE" --margin "${MARGIN:-pickscore}" --limit 300

# 2. Score every pair and keep 5,000. From the hub, images come in pieces; 20 GB of them stay on the disk.
fifa filter "$SOURCE" --margin "${MARGIN:-pickscore}" --quality "${QUALITY:-local}" --diversity "${DIVERSITY:-minilm}" \
  --per-prompt 3 \
  --keep "${KEEP:-5000}" --cache-gb 20 --out "$OUT/run"
fifa info "$OUT/run"

# 3. Train. Ten epochs at the settings of diffusers' own example; a dry run first says whether it fits.
read -ra train <<<"${TRAIN:---preset lora-small --draws 2}"
fifa train "$OUT/run" --model "$MODEL" "${train[@]}" --out "$OUT/lora" --dry-run
fifa train "$OUT/run" --model "$MODEL" "${train[@]}" --out "$OUT/lora"

# 4. The same prompts and seeds before and after, by a scorer that did not pick the pairs.
read -ra evaluate <<<"${EVALUATE:---limit 100 --seeds 4}"
fifa evaluate --base "$MODEL" --tuned lora="$OUT/lora" --prompts "$PROMPTS" --score "${SCORER:-hpsv2.1}" \
  "${evaluate[@]}" --out "$OUT/run"
