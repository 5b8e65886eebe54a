#!/bin/sh
# What the selection buys has to be shown against controls: the same scores, other selections.
#   examples/controls.sh RUN    (a finished run of `fifa filter`)
set -eu
for strategy in fifa random low middle high; do
  cp -r "$1" "$1-$strategy"
  rm -rf "$1-$strategy/subset"
  fifa select "$1-$strategy" --strategy "$strategy"
  fifa export "$1-$strategy"
done
