#!/bin/bash
# tidy.sh BUILD_DIR JOBS: clang-tidy on the sources that changed against origin/main or, where that is not known or is
# the commit itself, in the last commit. Headers are checked through the sources that include them; unit tests are left
# to the compiler's warnings.
set -euo pipefail
build=$1 jobs=$2
base=$(git merge-base HEAD origin/main 2>/dev/null || true)
if [[ -z $base || $base == $(git rev-parse HEAD) ]]; then
  base=$(git rev-parse -q --verify HEAD~1 || git hash-object -t tree /dev/null)
fi
mapfile -t changed < <(git diff --name-only --diff-filter=d "$base" -- 'src/*.cc' 'apps/*.cc' 'bench/*.cc' 'tests/*.cc' 'examples/*.cc' ':!*_test.cc')

files=()
for file in "${changed[@]}"; do
  # Only what this configuration compiles: other files have no command to check them with.
  if grep -qF "\"file\": \"$PWD/$file\"" "$build/compile_commands.json"; then files+=("$file"); fi
done
echo "tidy: ${#files[@]} of ${#changed[@]} changed sources are part of $build"
((${#files[@]})) || exit 0
printf '%s\0' "${files[@]}" |
  xargs -0 -n 1 -P "$jobs" clang-tidy-14 -p "$build" --quiet --extra-arg=-Wno-unknown-warning-option
