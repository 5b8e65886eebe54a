#!/usr/bin/env bash
# Pick-a-Pic v2 to a LoRA for SDXL, on one card with 24 GB: 2,000 pairs, five epochs, at 1,024 pixels.
#   SOURCE=/data/pickapic_v2 PROMPTS=prompts.txt bash examples/pickapic-sdxl.sh
set -euo pipefail
: "${SOURCE:?name a copy of Pick-a-Pic v2 with its images: a folder, or hf://datasets/OWNER/NAME}"
: "${PROMPTS:?name a file with test prompts, one a line}"
MODEL=${MODEL:-stabilityai/stable-diffusion-xl-base-1.0}
OUT=${OUT:-pickapic-sdxl}

fifa filter "$SOURCE" --margin "${MARGIN:-pickscore}" --quality "${QUALITY:-local}" --diversity "${DIVERSITY:-minilm}" \
  --per-prompt 3 \
  --keep "${KEEP:-2000}" --cache-gb 20 --out "$OUT/run"

# On 24 GB activations are computed twice and eight pairs go through at once; both are found by trying.
read -ra train <<<"${TRAIN:---preset lora-small --epochs 5 --draws 2 --resolution 1024}"
fifa train "$OUT/run" --model "$MODEL" "${train[@]}" --out "$OUT/lora" --dry-run
fifa train "$OUT/run" --model "$MODEL" "${train[@]}" --out "$OUT/lora"

read -ra evaluate <<<"${EVALUATE:---limit 50 --seeds 2}"
fifa evaluate --base "$MODEL" --tuned lora="$OUT/lora" --prompts "$PROMPTS" --score "${SCORER:-hpsv2.1}" \
  "${evaluate[@]}" --out "$OUT/run"
# For ComfyUI and the web UIs
fifa convert "$OUT/lora" --layout kohya --out "$OUT/lora.safetensors"
