#!/usr/bin/env bash
# The trained policy in a simulator, in closed loop through the engine: three tasks, chosen by their sentence. Then the
# proof that the engine's numbers are those of the reference implementation. Nothing needs a GPU or a display.
#
# usage: examples/demo.sh BINARY OUTPUT_FOLDER [VENV [CHECKPOINT]]
# VENV: where servoflow, servoflow-eval and the simulator are installed (`make demo` makes it); without it, the proof alone.
set -eu
cd "$(dirname "$0")/.."
servoflow=${1:-build/release/servoflow}
out=${2:-build/demo}
venv=${3:-}
policy=${4:-models/metaworld-nano}
checkpoint=tests/golden/openpi-tiny
mkdir -p "$out"
test -x "$servoflow" || { echo "demo: $servoflow is missing; run \`make demo\`, which builds it" >&2; exit 2; }

say() { printf '\n== %s\n' "$*"; }
show() { printf '$ %s\n\n' "$*"; }

if test -n "$venv"; then
  test -x "$venv/bin/servoflow-eval" || { echo "demo: $venv/bin/servoflow-eval is missing; run \`make demo\`, which installs it" >&2; exit 2; }
  test -e "$policy/config.json" || { echo "demo: there is no policy in $policy" >&2; exit 2; }
  say "A policy of 8 million parameters sees three cameras of 128 pixels and a sentence, and moves a robot arm"
  show "servoflow-eval film bench/closed_loop.toml --arm bf16 --task … --episodes 5 --out $out --together $out/closed-loop.gif"
  "$venv/bin/servoflow-eval" film bench/closed_loop.toml --checkpoint "$policy" --arm bf16 --episodes 5 \
    --task push-v3 --task faucet-open-v3 --task faucet-close-v3 --out "$out" --together "$out/closed-loop.gif"
  echo
  echo "The two faucets look the same to the policy: the sentence alone says which way to turn."
fi

say "Every stage is recomputed and compared with recordings of the reference implementation"
show "servoflow verify $checkpoint"
"$servoflow" verify "$checkpoint" --log-level warn

if test -n "$venv"; then
  say "Open $out/closed-loop.gif: what the policy did, and under each view what it saw"
fi
