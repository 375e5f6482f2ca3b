# make demo   the whole system end to end on this machine (make demo DATA=folder: on your own captioned images)
#             make demo GPU=1: the same recipe at the size of one GPU
# make ladder the recipe's three stages, 32 -> 64 -> 128 px, each from the one before
# make ablate what each part of the recipe is worth, at equal FLOPs (hours; goes on where it was stopped)
# make test   every test that needs no GPU
# make test-dist    of these the ones with several ranks alone
# make test-slurm   the sbatch files on a real Slurm of two nodes on this machine (installs Slurm where it is missing)
PYTHON  ?= python3
VENV    ?= .venv
PY      := $(VENV)/bin/python
DATA    ?=
OUTPUT  ?= runs/demo$(if $(DATA),_$(notdir $(patsubst %/,%,$(DATA))))$(if $(GPU),_gpu)
CONFIG  ?=
GPU     ?=
# Extra pip arguments for torch, such as --index-url with an index of CPU wheels.
TORCH_PIP_ARGS ?=
# One thread per test process; idle OpenMP threads must sleep instead of spinning on a shared core.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
WORKERS  ?= 2

.PHONY: demo ladder ablate test test-dist test-slurm test-gpu lint bench bench-scale profile build clean install

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml $(wildcard csrc/* csrc/cuda/*)
	@start=$$(date +%s); \
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || exit 1; \
	$(PY) -m pip install --quiet --upgrade "setuptools>=77" wheel || exit 1; \
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(PY) -m pip install --quiet $(TORCH_PIP_ARGS) "torch>=2.11,<2.15" || exit 1; \
	else \
	  echo "no NVIDIA GPU found: installing the CPU build of torch"; \
	  $(PY) -m pip install --quiet $(TORCH_PIP_ARGS) "torch==2.13.0+cpu" 2>/dev/null \
	    || { echo "pip's index has no CPU build of torch: installing its default build, which may bring CUDA (gigabytes);"; \
	         echo "to avoid that, stop and give an index of CPU wheels in TORCH_PIP_ARGS"; \
	         $(PY) -m pip install --quiet $(TORCH_PIP_ARGS) "torch==2.13.0"; } || exit 1; \
	fi; \
	$(PY) -m pip install --quiet --no-build-isolation -e ".[hf,test]" || exit 1; \
	echo $$(( $$(date +%s) - start )) > $(VENV)/.install_seconds; \
	touch $@; echo "installed into $(VENV) in $$(cat $(VENV)/.install_seconds) s"

demo: install
	OMP_WAIT_POLICY=PASSIVE $(PY) tools/demo.py --output "$(OUTPUT)" $(if $(DATA),--data "$(DATA)") \
	  $(if $(GPU),--config examples/demo_gpu.yaml --scenes 400000) \
	  $(if $(CONFIG),--config "$(CONFIG)") --install-seconds $$(cat $(VENV)/.install_seconds)

LADDER  := examples/scenes
ladder: install
	OMP_WAIT_POLICY=PASSIVE $(PY) tools/demo.py --output runs/ladder \
	  --config $(LADDER)/stage1_32.yaml $(LADDER)/stage2_64.yaml $(LADDER)/stage3_128.yaml \
	  --scene-sizes 128x128 168x96 96x168 144x112 112x144 160x104 104x160 --prompts-per-skill 50 \
	  --install-seconds $$(cat $(VENV)/.install_seconds)

# One thread for each training: JOBS of them run side by side.
JOBS    ?= 2
ablate: install
	$(PY) tools/ablate.py --config examples/scenes/ablations.yaml --output runs/ablations --report benchmarks/ablations \
	  --jobs $(JOBS)

test: install
	$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) -m "not gpu" tests

test-dist: install
	$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) -m "dist and not gpu" tests

test-slurm: install
	$(TEST_ENV) $(PY) -m pytest -s tests/slurm/scenarios.py

test-gpu: install
	$(PY) -m pytest -m gpu tests

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

BENCH := OMP_WAIT_POLICY=PASSIVE $(PY) tools/bench_train.py --json --record benchmarks/train.md
bench: install
	$(BENCH) --config examples/demo_cpu.yaml
	$(BENCH) --compare diffusers --compare-compile --config examples/demo_cpu.yaml
	$(BENCH) --compare diffusers --compare-compile --preset nucleus_image_17b --num-layers 1 --dense-moe-strategy all_moe --num-experts 8 \
	  --capacity-factors 2 --grid 16 16 --global-batch-size 1
	OMP_WAIT_POLICY=PASSIVE $(PY) tools/bench_ops.py --repeats 100 --json --record benchmarks/ops.md

profile: install
	OMP_WAIT_POLICY=PASSIVE $(PY) tools/profile_train.py --config examples/demo_cpu.yaml

bench-scale: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) tools/bench_scale.py --ranks 4 --expert-model-parallel-sizes 1 2 4 \
	  --rounds 3 --output benchmarks/scale_cpu.json -- --config examples/demo_cpu.yaml --cpu-threads 1 --steps 5 --warmup 1

build: install
	$(PY) setup.py build_ext --inplace

clean:
	rm -rf build *.egg-info megatron_nucleus/_C*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
