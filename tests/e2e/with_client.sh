#!/bin/bash
# with_client.sh VENV SCRIPT ARGUMENTS…: runs a Python script where openpi's client is installed. The virtual
# environment is made on the first call. Without a package index the test cannot run: that is exit code 77 (skipped, with
# the reason) on a developer's machine and a failure in CI.
set -euo pipefail
venv=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
if ! cmp -s "$here/requirements.txt" "$venv/installed"; then
  if ! { python3 -m venv "$venv" && "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$here/requirements.txt"; } \
    >"$venv.log" 2>&1; then
    cat "$venv.log" >&2
    echo "cannot install openpi-client from the package index (above): this test did not run" >&2
    [[ -n ${CI:-} ]] && exit 1
    exit 77
  fi
  cp "$here/requirements.txt" "$venv/installed"
fi
exec 9>&-
exec "$venv/bin/python" "$@"
