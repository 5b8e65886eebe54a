#!/usr/bin/env bash
# A committee: several reward models look at the images, and a pair is kept only where most of them agree with the
# person. examples/committee.yaml is the same for a set that has their scores as columns.
#   SOURCE=... bash examples/committee.sh
set -euo pipefail
: "${SOURCE:?name the feedback}"
OUT=${OUT:-committee}
margins=()
for scorer in ${MARGINS:-pickscore hpsv2.1 imagereward clipscore}; do margins+=(--margin "$scorer"); done
# How often each of them is right, and how often two of them agree: what errs together is one voice, not two.
fifa trust "$SOURCE" "${margins[@]}" --limit "${LIMIT:-1000}"
fifa filter "$SOURCE" "${margins[@]}" --quality "${QUALITY:-local}" --diversity "${DIVERSITY:-minilm}" \
  --min-agreement 0.75 --per-prompt 3 \
  --keep "${KEEP:-5000}" --out "$OUT/run"
