#!/bin/bash
# setup_eval.sh PYTHON FOLDER: makes FOLDER/eval-venv with the simulator's pinned packages, and installs the wheel that
# setup.sh built into FOLDER/wheel. Ends with a frame of the simulator, so that a machine that cannot render says so here.
set -euo pipefail
python=$1 folder=$(cd "$2" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1
here=$(cd "$(dirname "$0")" && pwd)
stamp=$folder/eval-venv/made-of
made_of="$(sha256sum <"$here/requirements-eval.txt") $("$python" -V) $folder"
if [[ ! -f $stamp || $(cat "$stamp") != "$made_of" ]]; then
  rm -rf "$folder/eval-venv"
  "$python" -m venv "$folder/eval-venv"
  "$folder/eval-venv/bin/python" -m pip install -q --no-deps -r "$here/requirements-eval.txt"
  printf '%s' "$made_of" >"$stamp"
fi
"$folder/eval-venv/bin/python" -m pip install -q --no-deps --force-reinstall "$folder"/wheel/servoflow-*.whl
MUJOCO_GL=${MUJOCO_GL:-egl} "$folder/eval-venv/bin/python" - <<'CHECK' || exit 1
import sys

try:
    from servoflow_eval.metaworld import MetaWorldEnv

    env = MetaWorldEnv()
    env.reset("push-v3", 0)
    spread = float(env.draw().std())
except (ImportError, RuntimeError, ValueError) as error:
    sys.exit(f"the simulator does not work here: {error}")
if spread < 5:
    sys.exit(f"the simulator renders an empty picture (standard deviation {spread:.1f}); is Mesa's software renderer installed? "
             "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri")
print("simulator ready: MuJoCo 3.3.0, Meta-World 3.1.1, rendering without a display")
CHECK
