# make demo     the main job, end to end
# make test     all tests, on two cores (WORKERS=4 takes four)
# make fast     the tests of the folders that differ from the branch main, without the slow ones
# make check    format, lint and types of every folder
# make docs     the documentation, in site/: open site/index.html
# make bench    all benchmarks, see benchmarks/README.md (QUICK=1 for a trial, CORPORA=folder for real music)
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Workers of pytest take whole files, so that a module's fixtures are built once. A worker that is done takes more.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
FOLDERS := corpus evaluation hub_cards modeling tokenization training

# As the commands and training scripts set it, for everything else that runs here.
export GOMP_SPINCOUNT ?= 10000
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test fast check docs bench clean-demo

demo: $(VENV)/demo
	$(BIN)/midimamba demo --out $(RUN)

test: $(VENV)/dev
	$(PYTEST)

# A folder's tests stand in tests/ under the same name; those of src/midimamba stand in tests/ itself.
fast: $(VENV)/dev
	@changed=$$( (git diff --name-only --merge-base main; git ls-files --others --exclude-standard) \
		| sed -nE 's#^src/.*#tests/test_*.py#p; s#^tests/(test_[^/]*\.py)$$#tests/\1#p; s#^(tests/)?([a-z_]+)/.*#tests/\2#p' \
		| sort -u | while read -r tests; do ls -d $$tests 2>/dev/null; done | sort -u); \
	if [ -z "$$changed" ]; then echo "no folder with tests differs from main"; \
	else echo "==>" $$changed; $(PYTEST) -m "not slow" $$changed; fi

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy needs the package as it is installed: one folder, midimamba, with the others inside.
	@rm -rf build && mkdir -p build/types/midimamba
	@ln -s $(CURDIR)/src/midimamba/* $(addprefix $(CURDIR)/,$(FOLDERS)) build/types/midimamba
	$(BIN)/mypy

# Without the variable, mkdocs-material prints a notice about its successor at every start.
docs: $(VENV)/dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

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
