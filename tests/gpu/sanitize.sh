#!/bin/bash
# compute-sanitizer over tests of the CUDA backend: every tool on every test of the filter, tools side by side.
#
# usage: sanitize.sh TEST_BINARY [FILTER [SECONDS [TOOLS]]]
#   FILTER   as in --gtest_filter; default: all operations in bf16 but the shapes of full size
#   SECONDS  for each tool; default 600. A tool that does not finish has failed, and says how far it came.
#   TOOLS    default: "memcheck racecheck synccheck initcheck"
# An argument that is empty is one that is not given. SANITIZER: the program, where it is not found.
#
# memcheck: accesses outside of allocations; racecheck: shared memory; synccheck: barriers; initcheck: reads of global
# memory that nobody wrote, which is little here: the backend hands out zeroed memory. Prints one line per tool; what
# was found is in the logs that it names. A tool under which no test ran has failed.
set -uo pipefail
if [[ $# -lt 1 || ! -x $1 ]]; then
  echo "sanitize: ${1:-TEST_BINARY} is not a program; see the head of $0" >&2
  exit 2
fi
binary=$1
filter=${2:-'Cuda/Ops.*/bf16:-*.ExpertOfFullSize/*'}
limit=${3:-600}
tools=${4:-memcheck racecheck synccheck initcheck}
sanitizer=${SANITIZER:-$(command -v compute-sanitizer ||
  ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | tail -1)}
if [[ ! -x $sanitizer ]]; then
  echo "sanitize: compute-sanitizer is not here; it comes with the CUDA toolkit" >&2
  exit 2
fi
"$sanitizer" --version | grep -i version
echo "filter: $filter"
logs=$(mktemp -d)
run() {
  local tool=$1 options=() begin=$SECONDS status=0
  [[ $tool == memcheck ]] && options=(--leak-check no)
  timeout -k 5 "$limit" "$sanitizer" --tool "$tool" --error-exitcode 86 --print-limit 20 "${options[@]}" "$binary" \
    --gtest_filter="$filter" >"$logs/$tool.log" 2>&1 || status=$?
  local passed failed summary
  passed=$(grep -c '^\[       OK \]' "$logs/$tool.log")
  failed=$(grep -c '^\[  FAILED  \].*ms)$' "$logs/$tool.log")
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$tool.log" | tail -1 | sed 's/^=* *//')
  case $status in
    124 | 137) summary="NOT FINISHED in $limit s, in $(grep '^\[ RUN' "$logs/$tool.log" | tail -1 | sed 's/^.*\] //'); $summary" ;;
    0)
      if [[ $passed == 0 ]]; then
        status=1
        summary="no test of this name; $summary"
      fi
      ;;
    *) summary="exit $status; $summary" ;;
  esac
  printf '%-10s %3d tests passed, %d failed, %4d s: %s (%s)\n' "$tool" "$passed" "$failed" $((SECONDS - begin)) \
    "$summary" "$logs/$tool.log"
  return "$status"
}
jobs=() failures=0
for tool in $tools; do
  run "$tool" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || failures=$((failures + 1)); done
for tool in $tools; do
  grep -E '^=========' "$logs/$tool.log" | grep -vE 'SUMMARY|COMPUTE-SANITIZER' | head -"${SANITIZE_LINES:-40}" | sed "s/^/$tool: /"
done
echo "$failures of $(wc -w <<<"$tools") tools found something or did not finish"
exit $((failures > 0))
