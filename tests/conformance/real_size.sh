#!/bin/bash
# The real size: regenerates a pi0.5 checkpoint of synthetic weights (6.7 GB) and a reference case for it, computed by the
# independent PyTorch implementation in tests/golden/tools, and verifies the engine against it in fp32 and bf16.
#
# usage: real_size.sh BINARY PYTHON FOLDER     PYTHON has torch, numpy and safetensors; about 10 minutes on two cores,
#                                              16 GB of memory and 7 GB of disk. FOLDER is kept for the next run.
set -euo pipefail
binary=$(realpath "$1") python=$2 folder=$3
tools=$(realpath "$(dirname "$0")/../golden/tools")
checkpoint=$folder/pi05-seed0
mkdir -p "$folder"
folder=$(realpath "$folder")
if [[ ! -f $checkpoint/model.safetensors ]]; then
  "$binary" synth --model pi05 --layout openpi --dtype bf16 --seed 0 "$checkpoint"
fi
mkdir -p "$checkpoint/cases"
if [[ ! -f $checkpoint/cases/two-cameras-200-tokens.safetensors ]]; then
  (cd "$tools" && "$python" fullsize.py make "$folder/case.safetensors" --seed 0 --views 2 --tokens 200 --steps 10)
  mv "$folder/case.safetensors" "$checkpoint/cases/two-cameras-200-tokens.safetensors"
fi
"$binary" verify "$checkpoint" --precision fp32
"$binary" verify "$checkpoint" --precision bf16
