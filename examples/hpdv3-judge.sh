#!/usr/bin/env bash
# HPDv3, judged by a vision-language model that somebody serves (vLLM, SGLang, any OpenAI-compatible endpoint). A
# judge is slow: PickScore looks at everything, the judge at the fifth of the pairs where its word counts most.
#   SOURCE=/data/HPDv3 JUDGE=vlm:Qwen/Qwen3-VL-8B-Instruct@http://localhost:8000/v1 bash examples/hpdv3-judge.sh
set -euo pipefail
: "${SOURCE:?name HPDv3: its folder, with images}"
JUDGE=${JUDGE:-vlm:Qwen/Qwen3-VL-8B-Instruct@http://localhost:8000/v1}
OUT=${OUT:-hpdv3}
# Does the judge agree with people, and does it answer by position?
fifa trust "$SOURCE" --margin "$JUDGE" --limit "${LIMIT:-300}"
fifa filter "$SOURCE" --margin "${MARGIN:-pickscore}" --margin "$JUDGE" --budget "${BUDGET:-20%}" \
  --quality "${QUALITY:-local}" --diversity "${DIVERSITY:-minilm}" \
  --min-agreement 0.5 --keep "${KEEP:-5000}" --out "$OUT/run"
# Who disagrees with people, and where
fifa trust "$OUT/run"
