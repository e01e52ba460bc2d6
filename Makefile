# make demo: the main job, end to end.   make test: the whole suite.   make check: format, lint, types.
# make bench [QUICK=1] [CORPORA=folder]: every benchmark, see benchmarks/README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
THREADS := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --num_cpu_threads_per_process $(THREADS) \
	--mixed_precision no --dynamo_backend no

# As the commands and training scripts set it, for everything else that runs here.
export GOMP_SPINCOUNT ?= 10000
export TOKENIZERS_PARALLELISM = false

# stage(result, command): skip what is there, say so.
stage = @if [ -e $(1) ]; then echo "already there: $(1)"; else echo "==> $(1)"; $(2); fi

.PHONY: demo test check bench clean-demo

demo: $(VENV)/demo
	$(call stage,$(RUN)/data,$(BIN)/midimamba tokenize chorales --vocab-size 800 --out $(RUN)/data)
	$(call stage,$(RUN)/pretrained/config.json,$(LAUNCH) training/pretrain.py --config training/recipes/chorales-cpu.yaml --resume_from_checkpoint true)
	$(call stage,$(RUN)/generator/config.json,$(LAUNCH) training/adversarial.py --config training/recipes/chorales-cpu-adversarial.yaml --resume_from_checkpoint true)
	$(call stage,$(RUN)/samples,$(BIN)/midimamba generate $(RUN)/generator --num 8 --bars 16 --render --out $(RUN)/samples)
	$(call stage,$(RUN)/report.md,$(BIN)/python -m midimamba.evaluation.report $(RUN))
	@echo "read $(RUN)/report.md, listen to $(RUN)/samples; 'make clean-demo' starts over"

test: $(VENV)/dev
	$(BIN)/python -m pytest

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy wants the package as it is installed: the folders of the repository carry other names.
	@rm -rf build && $(PIP) --no-deps --no-build-isolation --target build/check .
	cd build/check && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p midimamba

bench: $(VENV)/dev
	$(BIN)/python benchmarks/all.py $(if $(QUICK),--quick) $(if $(CORPORA),--corpora $(CORPORA))

clean-demo:
	rm -rf $(RUN)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel

$(VENV)/demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/demo
