#!/bin/bash
# setup.sh PYTHON FOLDER CC CXX: makes FOLDER/venv with the pinned packages, builds the wheel of this tree into
# FOLDER/wheel as `pip install .` does, and installs it there. FOLDER lies beside the surrounding build's folder and
# the compilers are that build's, so that ccache gives its objects. SF_REQUIREMENTS: other packages than requirements.txt.
set -euo pipefail
python=$1 folder=$2
export CC=$3 CXX=$4 PIP_DISABLE_PIP_VERSION_CHECK=1 CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2}
source=$(cd "$(dirname "$0")/../.." && pwd)
requirements=${SF_REQUIREMENTS:-$source/python/tests/requirements.txt}

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
stamp=$folder/venv/made-of
made_of="$(sha256sum <"$requirements") $("$python" -V) $folder"
if [[ ! -f $stamp || $(cat "$stamp") != "$made_of" ]]; then
  rm -rf "$folder/venv"
  "$python" -m venv "$folder/venv"
  "$folder/venv/bin/python" -m pip install -q --no-deps -r "$requirements"
  printf '%s' "$made_of" >"$stamp"
fi
rm -rf "$folder/wheel"
"$folder/venv/bin/python" -m pip wheel -q --no-build-isolation --no-deps --no-cache-dir -w "$folder/wheel" "$source" \
  --config-settings=build-dir="$folder"
"$folder/venv/bin/python" -m pip install -q --no-deps --force-reinstall "$folder"/wheel/servoflow-*.whl
"$folder/venv/bin/python" -c 'import servoflow; print("servoflow", servoflow.__version__, servoflow.__file__)'
