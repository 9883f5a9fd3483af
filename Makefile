# Two commands: `make demo` and `make test`. Everything runs in one virtual environment, .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: install demo test check gpu zero3 aot fuzz bench bench-gpu docs clean

install: $(VENV)/.installed

# A machine with an NVIDIA driver gets the CUDA build of torch (and the Triton that it brings), any
# other the CPU build: from whatever index or folder pip is configured with, else from PyTorch's own.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q "torch==$(TORCH)"; \
	else $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(BIN)/pip install -q "torch==$(TORCH)" --index-url $(CPU_INDEX); fi
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

# make demo DATA=pairs.jsonl trains on preference pairs of your own.
demo: install
	$(BIN)/python examples/demo.py $(if $(DATA),--data $(DATA))

# Kernels run in Triton's interpreter, which must be chosen before Triton is imported, and are
# compiled ahead of time, which the interpreter forbids: hence several processes. The tests of the op
# run once more with --backend triton; the case left out is in docs/log.md.
LARGE_FP32 := tests/core/test_linear_logps.py::test_error_within_twice_that_of_naive[6.0-0.0-dtype0]
test: install
	HF_HUB_OFFLINE=1 $(BIN)/pytest --ignore=tests/kernels --ignore=tests/aot
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels -m "not fuzz"
	TRITON_INTERPRET=1 $(BIN)/pytest --backend triton --deselect '$(LARGE_FP32)' \
	  tests/core/test_linear_logps.py tests/core/test_fused_loss.py
	$(BIN)/pytest tests/aot

# Kernels on the GPU at hand, at real sizes. Without a network, with the machine's own torch and pytest:
# make -o install gpu BIN=$$(dirname $$(command -v python3))
gpu: install
	PYTHONPATH=$(CURDIR) $(BIN)/python -P -m pytest -m gpu tests/gpu tests/heads

# Heads under real DeepSpeed ZeRO-3, in two processes on the CPU; DeepSpeed is installed aside.
DEEPSPEED := out/deepspeed-0.19.8
zero3: install $(DEEPSPEED)
	DS_ACCELERATOR=cpu PYTHONPATH=$(CURDIR):$(CURDIR)/$(DEEPSPEED) \
	  $(BIN)/pytest tests/heads/test_zero3.py

$(DEEPSPEED):
	$(BIN)/pip install -q --target $@ einops hjson msgpack ninja py-cpuinfo pydantic
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install -q --no-deps --no-build-isolation \
	  --target $@ $(subst -,==,$(notdir $@)) || { rm -rf $@; exit 1; }

# Every config row compiles for its architecture; make aot TRITON=3.6.0 gates another release,
# installed aside.
aot: install
	$(if $(TRITON),$(BIN)/pip install -q --no-deps --target out/triton-$(TRITON) triton==$(TRITON))
	$(if $(TRITON),PYTHONPATH=$(CURDIR)/out/triton-$(TRITON)) $(BIN)/pytest -m aot tests/aot

# 2,000 random cases of the op in the interpreter; a failure names its seed.
fuzz: install
	TRITON_INTERPRET=1 $(BIN)/pytest -m fuzz tests/kernels

# Side by side with the rivals on this CPU, 10 minutes on a quiet machine of 2 cores. A status of 75
# says that the time was up before every row was measured; what is there is plotted.
bench: install
	$(BIN)/python -m benchmarks.cpu_claim
	$(BIN)/python -m benchmarks.run --device cpu --cases cpu --budget 330 || test $$? -eq 75
	$(BIN)/python -m benchmarks.end_to_end --rounds 5
	$(BIN)/python -m benchmarks.plot "$$(ls -t benchmarks/results/cpu/*.csv | head -1)"

# On a GPU, without network: each call stays under 8 minutes; repeat until it exits with 0.
bench-gpu: install
	$(BIN)/python -m benchmarks.run --device cuda --cases gpu --budget 420
	$(BIN)/python -m benchmarks.end_to_end --device cuda

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist *.egg-info
