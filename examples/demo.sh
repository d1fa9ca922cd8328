#!/usr/bin/env bash
# The trained policy in a simulator, in closed loop through the engine: three tasks, chosen by their sentence. Then the
# proof that the engine's numbers are those of the reference implementation. Nothing needs a GPU or a display.
#
# usage: examples/demo.sh VENV [OUTPUT_FOLDER [CHECKPOINT]]
# VENV: where servoflow, servoflow-eval and the simulator are installed; `make demo` makes it.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-build/release-python/eval-venv}
out=${2:-build/demo}
policy=${3:-models/metaworld-nano}
mkdir -p "$out"
test -x "$venv/bin/servoflow-eval" || { echo "demo: $venv/bin/servoflow-eval is missing; run \`make demo\`, which installs it" >&2; exit 2; }
test -e "$policy/config.json" || { echo "demo: there is no policy in $policy" >&2; exit 2; }

say() { printf '\n== %s\n' "$*"; }
show() { printf '$ %s\n\n' "$*"; }

say "A policy of 8 million parameters sees three cameras of 128 pixels and a sentence, and moves a robot arm"
show "servoflow-eval film bench/closed_loop.toml --arm bf16 --task … --episodes 5 --out $out --together $out/closed-loop.gif"
"$venv/bin/servoflow-eval" film bench/closed_loop.toml --checkpoint "$policy" --arm bf16 --episodes 5 \
  --task push-v3 --task faucet-open-v3 --task faucet-close-v3 --out "$out" --together "$out/closed-loop.gif"
echo
echo "The two faucets look the same to the policy: the sentence alone says which way to turn."

say "Recorded calls of openpi's PyTorch code are computed again and compared"
show "examples/check_recordings.py"
"$venv/bin/python" examples/check_recordings.py

say "Open $out/closed-loop.gif: what the policy did, and under each view what it saw"
echo "\`make build\` makes the command line, build/release/servoflow; its \`verify\` compares every stage of the network."
