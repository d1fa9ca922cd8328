#!/bin/bash
# The real size: regenerates a pi0.5 checkpoint of synthetic weights (6.7 GB) and reference cases for it, computed in FP32
# by the independent PyTorch implementation in tests/golden/tools, and verifies the engine against them in fp32 and bf16.
#
# usage: real_size.sh BINARY PYTHON FOLDER [DEVICE]
#   PYTHON has torch, numpy and safetensors. FOLDER is kept for the next run.
#   DEVICE cpu (default): one case, about 10 minutes on two cores, 16 GB of memory and 7 GB of disk.
#   DEVICE cuda[:N]: PyTorch computes on that GPU too, TF32 off; three cases in about a minute.
set -euo pipefail
binary=$(realpath "$1") python=$2 folder=$3 device=${4:-cpu}
tools=$(realpath "$(dirname "$0")/../golden/tools")
checkpoint=$folder/pi05-seed0
mkdir -p "$folder"
folder=$(realpath "$folder")
if [[ ! -f $checkpoint/model.safetensors ]]; then
  "$binary" synth --model pi05 --layout openpi --dtype bf16 --seed 0 "$checkpoint"
fi
mkdir -p "$checkpoint/cases"
# make NAME VIEWS TOKENS
make_case() {
  local case=$checkpoint/cases/$1.safetensors
  [[ ! -f $case ]] || return 0
  (cd "$tools" && "$python" fullsize.py make "$folder/case.safetensors" --seed 0 --views "$2" --tokens "$3" --steps 10 \
    --device "$device")
  mv "$folder/case.safetensors" "$case"
}
make_case two-cameras-200-tokens 2 200
if [[ $device == cuda* ]]; then
  make_case three-cameras-200-tokens 3 200
  make_case two-cameras-48-tokens 2 48
fi
status=0
for precision in fp32 bf16; do
  "$binary" verify "$checkpoint" --device "$device" --precision "$precision" --json "$folder/verify-$precision.json" ||
    status=$?
done
exit "$status"
