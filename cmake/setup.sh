#!/bin/bash
# setup.sh apt|skip PACKAGE…: installs those Debian packages that are missing, and nothing when all are there.
set -euo pipefail
mode=$1
shift
[[ $mode == skip ]] && exit 0

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "setup: this system has no apt. Install the equivalents of these Debian 12 packages, then pass SETUP=skip to make:" >&2
  echo "  $*" >&2
  exit 1
fi

missing=()
for package in "$@"; do
  if [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) != "install ok installed" ]]; then
    missing+=("$package")
  fi
done
if ((${#missing[@]} == 0)); then
  echo "setup: all $# packages are installed"
  exit 0
fi

as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "setup: not root and no sudo. Install these packages as root: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "setup: installing ${missing[*]}"
# A third-party source that cannot be refreshed need not matter; a package that cannot be installed does.
"${as_root[@]}" apt-get update -q </dev/null || echo "setup: apt-get update failed, trying to install all the same" >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}" </dev/null
