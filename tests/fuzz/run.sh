#!/bin/bash
# run.sh BUILD_DIR SECONDS [SEED]: runs every libFuzzer target of the build for that long, from its seed corpus. A SEED
# other than 0 repeats the same inputs, so that a check fails because of the change it checks. Inputs it finds are kept
# in BUILD_DIR/corpus; one that fails is kept in BUILD_DIR/crashes and ends the run.
set -euo pipefail
build=$1 seconds=$2 seed=${3:-0}
here=$(dirname "$0")
mkdir -p "$build/crashes"
count=0
while read -r name seeds <&3; do
  target=$build/bin/fuzz_$name
  found=$build/corpus/$name
  mkdir -p "$found"
  dictionary=()
  [[ -f $here/$name.dict ]] && dictionary=("-dict=$here/$name.dict")
  log=$build/$name.log
  if ! "$target" -max_total_time="$seconds" -seed="$seed" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1 \
    -artifact_prefix="$build/crashes/$name-" "${dictionary[@]}" "$found" "$seeds" </dev/null >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    echo "fuzz: $name failed" >&2
    exit 1
  fi
  echo "fuzz: $name: $(sed -nE 's/^stat::number_of_executed_units: +//p' "$log") inputs, no failure"
  count=$((count + 1))
done 3<"$build/fuzz_targets.txt"
echo "fuzz: $count targets, $seconds s each"
