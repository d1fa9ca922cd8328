#!/usr/bin/env bash
# One policy end to end on real camera frames, then the proof that its numbers are right. A tiny random network stands in
# for a trained one: its actions mean nothing, but every stage is the real one.
#
# usage: examples/demo.sh [BINARY [OUTPUT_FOLDER]]
set -eu
cd "$(dirname "$0")/.."
servoflow=${1:-build/release/servoflow}
out=${2:-build/demo}
checkpoint=tests/golden/openpi-tiny
mkdir -p "$out"
test -x "$servoflow" || { echo "demo: $servoflow is missing; run \`make demo\`, which builds it" >&2; exit 2; }

say() { printf '\n== %s\n' "$*"; }
show() { printf '$ servoflow %s\n\n' "$*"; }

say "1. Two camera frames, a state and a prompt become robot actions"
show "run $checkpoint --robot libero --image base_0_rgb=examples/frames/base.png … --prompt 'open the drawer' --plot $out/actions.svg"
"$servoflow" run "$checkpoint" --robot libero --seed 7 --precision fp32 --log-level warn \
  --image base_0_rgb=examples/frames/base.png --image left_wrist_0_rgb=examples/frames/wrist.png \
  --state 0.1,-1.1406,0.2,-0.3,0.4,-0.5,-0.3,-0.2 --prompt 'open the drawer' \
  --out "$out/actions.npy" --plot "$out/actions.svg"

say "2. Every stage is recomputed and compared with recordings of the reference implementation"
show "verify $checkpoint"
"$servoflow" verify "$checkpoint" --log-level warn

say "Written: $out/actions.svg (the plot) and $out/actions.npy"
