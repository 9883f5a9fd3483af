# Two commands: `make demo` and `make test`. Everything runs in one virtual environment, .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: install demo test check gpu zero3 dry-run kernels trl fuzz bench bench-gpu gpu-pack docs docs-check clean

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

# make demo DATA=pairs.jsonl MODEL=folder-or-hub-id trains on pairs, or a model, of your own.
demo: install
	$(BIN)/python examples/demo.py $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL))

# Kernels run in Triton's interpreter, which must be chosen before Triton is imported, and are
# compiled without a GPU, which the interpreter forbids: hence several processes. The tests of the op
# and of the heads run once more with the word filter at work and with --backend triton; those for a
# GPU run their Python here.
JOBS   ?= 2
PYTEST := $(BIN)/pytest --durations=15
test: install
	HF_HUB_OFFLINE=1 $(PYTEST) -n $(JOBS) -m "not gpu" --ignore=tests/kernels --ignore=tests/dry_run
	$(PYTEST) -n $(JOBS) --filter-eps 1e-30 tests/core/test_linear_logps.py tests/core/test_fused_loss.py \
	  tests/core/test_strided.py tests/heads/test_lora_head.py tests/heads/test_quantized_head.py
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) tests/kernels tests/rivals/test_word_filter.py -m "not fuzz"
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) -m "not gpu" --backend triton \
	  tests/core/test_linear_logps.py tests/core/test_fused_loss.py tests/core/test_strided.py \
	  tests/core/test_passes.py tests/heads/test_packed_head.py tests/heads/test_dense_head.py
	HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) -m gpu tests/gpu
	$(PYTEST) tests/dry_run

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

# Another Triton release, installed aside: make dry-run TRITON=3.6.0, make kernels TRITON=3.6.0. The
# interpreter of 3.6 needs a NumPy that turns arrays of one element into numbers.
ASIDE := $(if $(TRITON),out/triton-$(TRITON))
$(ASIDE): | install
	PIP_CONSTRAINT= $(BIN)/pip install -q --no-deps --target $@ triton==$(TRITON) 'numpy<2.4'

# A dry run of the GPU: every launch compiled for every architecture and judged, minutes for each.
# One architecture: ARCH=sm_90. WRITE=1 writes the tables of benchmarks/results/ and docs/kernels.md.
dry-run: install $(ASIDE)
	$(if $(TRITON),PYTHONPATH=$(CURDIR)/$(ASIDE)) $(BIN)/python -m tools.dry_run \
	  $(addprefix --arch ,$(ARCH)) $(if $(WRITE),--write)

# Numerics of every kernel, in the interpreter.
kernels: install $(ASIDE)
	$(if $(TRITON),PYTHONPATH=$(CURDIR)/$(ASIDE)) TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels -m "not fuzz"

# The trainer's tests under another TRL, installed aside; docs/trainers.md lists what passed.
TRL ?= 1.12.0
trl: install
	PIP_CONSTRAINT= $(BIN)/pip install -q --no-deps --upgrade --target out/trl-$(TRL) trl==$(TRL)
	PYTHONPATH=$(CURDIR):$(CURDIR)/out/trl-$(TRL) HF_HUB_OFFLINE=1 $(BIN)/pytest \
	  $(addprefix tests/integrations/test_,$(addsuffix .py,trl trl_options lora_on_the_head padding_free tied_heads images))

# 2,000 random cases of the op in the interpreter; a failure names its seed.
fuzz: install
	TRITON_INTERPRET=1 $(BIN)/pytest -m fuzz tests/kernels

# Side by side with the rivals on this CPU, 10 minutes on a quiet machine of 2 cores. A status of 75
# says that the time was up before every row was measured; what is there is plotted.
NEWEST = "$$(ls -t benchmarks/results/cpu/*.csv | grep $(1) | head -1)"
bench: install
	$(BIN)/python -m benchmarks.run --device cpu --cases claim
	$(BIN)/python -m benchmarks.report goals --strict $(call NEWEST,-e claim)
	$(BIN)/python -m benchmarks.run --device cpu --cases cpu --rounds 5 --group-seconds 15 \
	  --budget 420 || test $$? -eq 75
	$(BIN)/python -m benchmarks.train_step --rounds 5
	$(BIN)/python -m benchmarks.report draw $(call NEWEST,-v -e claim -e packed -e scaling -e steps)

# On a GPU of your own: every step of docs/dev/gpu.md but sanitize, for which NVIDIA's checker must be
# there; each call under 8 minutes, results in OUT; one step: make gpu-suite. For a GPU machine without network: make gpu-pack prints what to run there.
OUT ?= out/gpu
GPU_STEPS := tests suite weights filter tune pairs steps longest scaling profile
bench-gpu: $(GPU_STEPS:%=gpu-%)

gpu-pack: install
	$(BIN)/python -m tools.pack

# 75: the time of the call was up, so the step goes on where it stopped.
gpu-%: install
	status=75; while test $$status -eq 75; do \
	  $(BIN)/python -m tools.gpu $* --out $(OUT); status=$$?; done; exit $$status

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation site, into out/site; a warning, such as a broken link, is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# It in headless Chromium (apt-get install chromium): console, requests, pictures, formulas, links,
# search; and pictures of some pages in out/site-pictures, to be looked at.
docs-check: docs
	$(BIN)/python -m tools.check_site

clean:
	rm -rf $(VENV) out build dist *.egg-info
