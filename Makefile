# Entry points for people and CI. `make` prints them; CMakePresets.json holds what each build means.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PREFIX ?= /usr/local
# Seconds that `make fuzz` spends on each target, and where its random inputs start (0: elsewhere each time).
SECONDS := 20
SEED := 0
JOBS ?= $(shell nproc)
# SETUP=skip: the dependencies are there already, whatever the package manager says.
SETUP ?= apt

PACKAGES := cmake ninja-build g++ ccache pkg-config python3 libhwy-dev libsentencepiece-dev nlohmann-json3-dev \
  libcli11-dev libspdlog-dev libfmt-dev libtomlplusplus-dev libpng-dev libjpeg62-turbo-dev zlib1g-dev libssl-dev \
  libboost-dev libmsgpack-cxx-dev libeigen3-dev libgtest-dev libbenchmark-dev libdnnl-dev \
  python3-dev python3-venv openssl curl
PACKAGES_CI := clang-14 libclang-rt-14-dev clang-format-14 clang-tidy-14
PACKAGES_PEERS := python3-venv
# Mesa's software renderer, for the simulator's cameras.
PACKAGES_SIM := libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 libgl1
SOURCES = $(shell git ls-files '*.h' '*.c' '*.cc' '*.cu' '*.cuh' '*.inc')

.PHONY: help setup build test demo install format format-check tidy layers asan tsan fuzz device cuda device-cuda \
  bench-peers bench-overheads plan-fit plan-tables test-gpu soak-gpu soak-serve sanitize-gpu sanitize-loop-gpu \
  bench-quantized verify-real-size verify-real-size-gpu test-interop eval-venv closed-loop test-ray test-libero clean

help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

# Stamps: build/setup, build/setup-ci, build/setup-peers, build/setup-sim. A changed list of packages is checked again.
setup: build/setup ## install the Debian packages that are missing
build/setup build/setup-ci build/setup-peers build/setup-sim: Makefile cmake/setup.sh
	@mkdir -p build
	@case $@ in *-ci) cmake/setup.sh $(SETUP) $(PACKAGES_CI);; *-peers) cmake/setup.sh $(SETUP) $(PACKAGES_PEERS);; \
	  *-sim) cmake/setup.sh $(SETUP) $(PACKAGES_SIM);; \
	  *) cmake/setup.sh $(SETUP) $(PACKAGES);; esac
	@touch $@

build: build/setup ## build everything; the binary is build/release/servoflow
	cmake --preset release
	cmake --build --preset release -j $(JOBS)

test: build build/setup-sim ## build everything and run all tests
	ctest --preset release -j $(JOBS)

test-libero: build/setup build/setup-sim ## the LIBERO adapter against LIBERO itself (2.1 GB from PyPI the first time, then some minutes)
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target servoflow
	SF_REQUIREMENTS=python/tests/with_libero/requirements.txt python/tests/setup.sh python3 build/release-libero cc c++
	build/release-libero/venv/bin/python -m pytest -q -rP -p no:cacheprovider --durations=0 --servoflow build/release/servoflow \
	  python/tests/with_libero

# The engine for Python alone, the simulator, then the trained policy in it.
demo: build/setup build/setup-sim ## the trained policy in a simulator, in closed loop: an animated picture (some minutes, no GPU)
	python/tests/setup.sh python3 build/release-python cc c++
	python/tests/setup_eval.sh python3 build/release-python
	examples/demo.sh build/release-python/eval-venv build/demo

eval-venv: build/setup build/setup-sim ## servoflow-eval and its simulator in build/release-python/eval-venv
	python/tests/setup.sh python3 build/release-python cc c++
	python/tests/setup_eval.sh python3 build/release-python

# PyTorch for the arm that the engine's FP32 is compared with (ARGS="--arm fp32 --arm bf16" plays only these).
closed-loop: eval-venv ## the whole closed-loop matrix (hours on two cores; goes on where it stopped): build/closed-loop
	build/release-python/eval-venv/bin/python -m pip install -q torch==2.13.0 safetensors==0.8.0 sentencepiece==0.2.3
	build/release-python/eval-venv/bin/servoflow-eval run bench/closed_loop.toml --out build/closed-loop $(ARGS)

test-ray: eval-venv ## the matrix on a Ray cluster of this machine (installs Ray from PyPI)
	build/release-python/eval-venv/bin/python -m pip install -q 'ray==2.60.0'
	cmake --preset release && cmake --build --preset release -j $(JOBS) --target servoflow
	build/release-python/eval-venv/bin/python -m pytest -q -p no:cacheprovider --servoflow build/release/servoflow \
	  python/tests/test_eval_ray.py

install: build ## install binary, headers, library and package files under PREFIX
	cmake --install build/release --prefix "$(PREFIX)"

format: build/setup-ci ## rewrite the C++ sources in the project's style
	@clang-format-14 -i $(SOURCES)

format-check: build/setup-ci ## fail if a C++ source is not in the project's style
	@clang-format-14 --dry-run --Werror $(SOURCES)

tidy: build/setup build/setup-ci ## clang-tidy on the files changed since origin/main (or in the last commit)
	cmake --preset release >/dev/null
	cmake/tidy.sh build/release $(JOBS)

layers: ## check that every include goes down the ladder
	python3 cmake/check_layers.py

asan: build/setup ## tests under the address and undefined-behaviour sanitizers
	cmake --preset asan-ubsan
	cmake --build --preset asan-ubsan -j $(JOBS)
	ctest --preset asan-ubsan -j $(JOBS) -LE 'slow|gpu'

tsan: build/setup ## tests of the threaded parts under the thread sanitizer
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS) --target \
	  $$(ninja -C build/tsan -t targets all | sed -nE 's#^(bin/(core|policy|capi|serve)_[A-Za-z0-9_]*_test): .*#\1#p')
	$$(setarch -R true 2>/dev/null && echo setarch -R) ctest --preset tsan -j $(JOBS) -R '^(core|policy|capi|serve)[.]' -LE 'slow|gpu'

fuzz: build/setup build/setup-ci ## run every fuzz target for SECONDS=20
	cmake --preset fuzz
	cmake --build --preset fuzz -j $(JOBS) --target fuzz_all
	tests/fuzz/run.sh build/fuzz $(SECONDS) $(SEED)

device: build/setup ## one folder that runs on a machine without packages: build/device/servoflow and lib/
	cmake --preset device
	cmake --build --preset device -j $(JOBS)
	cmake/check_linkage.sh build/device

cuda: build/setup ## build with the CUDA backend (needs nvcc)
	cmake --preset cuda
	cmake --build --preset cuda -j $(JOBS)

.PHONY: plan-fit plan-tables
plan-fit: build ## fit the planner's engine factors (profiles/*.toml) on bench/results, build again
	python3 bench/fit_profiles.py build/release/servoflow
	cmake --build --preset release -j $(JOBS) --target servoflow

plan-tables: plan-fit ## the same, then the tables of docs/planning.md
	python3 bench/plan_tables.py build/release/servoflow

device-cuda: build/setup ## the same folder with the CUDA backend and the tests: build/device-cuda (needs nvcc)
	cmake --preset device-cuda
	cmake --build --preset device-cuda -j $(JOBS)

bench-peers: build build/setup-peers ## measure servoflow against PyTorch, interleaved (ARGS for bench/peers/run.py)
	python3 bench/peers/run.py $(ARGS)

build/verify-venv/installed: build/setup-peers
	python3 -m venv build/verify-venv
	build/verify-venv/bin/python -m pip install -q torch==2.13.0 numpy safetensors
	@touch $@

verify-real-size: build build/verify-venv/installed ## parity at the published size against PyTorch (10 minutes, 7 GB)
	tests/conformance/real_size.sh build/release/servoflow build/verify-venv/bin/python build/real-size

build/interop-venv/installed: build/setup-peers tests/interop/requirements.txt
	python3 -m venv build/interop-venv
	build/interop-venv/bin/python -m pip install -q $$(grep '^torch' tests/interop/requirements.txt)
	build/interop-venv/bin/python -m pip install -q -r tests/interop/requirements.txt
	@touch $@

test-interop: build/setup build/interop-venv/installed ## quantized files exchanged with compressed-tensors and ModelOpt (1 GB)
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target interop_quant_file
	cd tests/interop && ../../build/interop-venv/bin/python -W ignore interop_test.py ../../build/release/bin/interop_quant_file

# On a machine with a GPU, after `make device-cuda`. GPU_PYTHON: an interpreter whose PyTorch sees the GPU.
GPU_PYTHON ?= python3
GPU_BUILD ?= build/device-cuda
test-gpu: ## the tests labelled gpu, from build/device-cuda
	ctest --test-dir $(GPU_BUILD) -L gpu --output-on-failure

soak-gpu: ## 10000 inferences at the published size: memory, repeats and batches of 1 to 16 (some minutes)
	LD_LIBRARY_PATH=$(GPU_BUILD)/lib $(GPU_BUILD)/servoflow bench --synthetic pi05 --device cuda --repeat 10000 --soak
	LD_LIBRARY_PATH=$(GPU_BUILD)/lib $(GPU_BUILD)/servoflow bench --synthetic pi05 --device cuda --batch 16 --ragged --batches \
	  --repeat 20 --soak

soak-serve: build ## 64 robots and 8 misbehaving clients for 10 minutes against the server; latency at 1 to 64 robots
	tests/e2e/with_client.sh build/client-venv tests/e2e/serve_soak.py build/release/servoflow --seconds 600 --ladder --json build/soak-serve.json

# TOOLS: of memcheck racecheck synccheck initcheck, all if empty. FILTER: of tests. LIMIT: seconds for each tool.
TOOLS :=
FILTER :=
LIMIT :=
sanitize-gpu: ## the same operations under compute-sanitizer (TOOLS="synccheck initcheck", FILTER, LIMIT seconds)
	LD_LIBRARY_PATH=$(GPU_BUILD)/lib tests/gpu/sanitize.sh $(GPU_BUILD)/bin/ops_cuda_ops_test '$(FILTER)' '$(LIMIT)' '$(TOOLS)'

sanitize-loop-gpu: ## the denoise loop in one launch, a layer of it, under compute-sanitizer (TOOLS, LIMIT)
	LD_LIBRARY_PATH=$(GPU_BUILD)/lib tests/gpu/sanitize.sh $(GPU_BUILD)/bin/ops_loop_trouble_test \
	  LoopTrouble.OneLayerOfOneStepUndisturbed '$(LIMIT)' '$(TOOLS)'

verify-real-size-gpu: ## the same on a GPU, PyTorch there too (a minute; needs build/device-cuda)
	LD_LIBRARY_PATH=$(GPU_BUILD)/lib tests/conformance/real_size.sh $(GPU_BUILD)/servoflow $(GPU_PYTHON) build/real-size-gpu cuda

bench-quantized: build ## measure the quantized recipes against bf16 on this CPU (ARGS for bench/quantized_cpu.py)
	python3 bench/quantized_cpu.py $(ARGS)

bench-overheads: build ## measure call overhead, tracing and a shared core
	python3 bench/overheads.py

clean: ## remove every build folder
	rm -rf build
