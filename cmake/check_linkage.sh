#!/bin/bash
# check_linkage.sh FOLDER: fails unless FOLDER/servoflow needs nothing but the C and C++ run-time libraries and what lies
# in FOLDER/lib, and starts with an empty library path.
set -euo pipefail
folder=$(realpath "$1")
binary=$folder/servoflow
if [[ ! -x $binary ]]; then
  echo "check_linkage: $binary is not there" >&2
  exit 1
fi
allowed='^(linux-vdso|ld-linux[^/]*|libc|libm|libstdc\+\+|libgcc_s|libgomp|libdl|libpthread|librt)\.so'
failed=0
while read -r name arrow path _; do
  base=$(basename "$name")
  if [[ $base =~ $allowed ]]; then continue; fi
  if [[ $arrow == "=>" && $path == "$folder/lib/"* ]]; then continue; fi
  echo "check_linkage: servoflow needs $base ($arrow $path)" >&2
  failed=1
done < <(env -u LD_LIBRARY_PATH ldd "$binary")
((failed == 0)) || exit 1
env -i "$binary" --help >/dev/null
echo "check_linkage: $(du -ch "$binary" "$folder"/lib/* 2>/dev/null | tail -1 | cut -f1) in all; beyond the C and C++ run time:" \
  "$(ls "$folder/lib" 2>/dev/null | tr '\n' ' ')"
