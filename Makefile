# make run | test | gate | slow | lint | format | golden | notebooks | bench | lock | resolve | clean      PYTHON=python3.12 VENV=dir ARGS="..." DATA=dir
PYTHON ?= python3
VENV ?= .venv
UV ?= uv
# Each worker starts with half of the tests, in their order; one that is done takes over half of what the other has left.
PARALLEL = -n 2 --dist worksteal
PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check
.PHONY: run test gate slow lint format golden notebooks bench lock resolve clean install install-dev FORCE

run: $(VENV)/.run
	$(VENV)/bin/python run.py --experiment digits $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not slow and not gate and not hardware" $(ARGS)

gate: $(VENV)/.dev
	$(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

golden: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/test_golden.py --update $(ARGS)

notebooks: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/test_notebooks.py --update $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev
	@set -e; for file in benchmarks/[!_]*.py; do \
	  case "$$file" in benchmarks/gpu_*) continue;; esac; \
	  case "$$file" in *_peers.py|*/input_pipeline.py) data="$(addprefix --data-dir ,$(DATA))";; *) data=;; esac; \
	  PYTHONPATH=. $(VENV)/bin/python "$$file" $$data $(ARGS); done

install: $(VENV)/.run
install-dev: $(VENV)/.dev

# Stamps: nothing is installed twice until a requirements file changes.
$(VENV)/.run: $(VENV)/.python requirements.txt
	@echo "installing requirements.txt into $(VENV) (some minutes the first time)"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	@echo "installing requirements/dev.txt into $(VENV)"
	@$(PIP) -r requirements/dev.txt
	@touch $@

# Holds the version of the environment's Python. An environment is kept as it is, unless PYTHON asks for another
# version: then .venv is made again, and a directory that the caller named is left alone with an error.
$(VENV)/.python: FORCE
	@set -e; code='import sys; print("%d.%d" % sys.version_info[:2])'; python="$(PYTHON)"; want=; had=; \
	if test -x $(VENV)/bin/python && $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	  had=$$($(VENV)/bin/python -c "$$code"); fi; \
	if test -z "$$had" || test "$(origin PYTHON)" != file; then \
	  want=$$("$$python" -c "$$code") || { echo "cannot run PYTHON=$$python"; exit 1; }; fi; \
	case "$${want:-$$had}" in 3.11|3.12|3.13) ;; *) \
	  echo "Python 3.11, 3.12 or 3.13 is needed; $$python is $${want:-$$had}. Name another: make PYTHON=python3.12"; \
	  exit 1;; esac; \
	if test -n "$$had" && test -n "$$want" && test "$$had" != "$$want" && test "$(VENV)" != .venv; then \
	  echo "$(VENV) holds Python $$had, not $$want: name another directory with VENV=dir"; exit 1; fi; \
	if test -n "$$want" && test "$$had" != "$$want"; then \
	  echo "making $(VENV) with Python $$want"; "$$python" -m venv --clear $(VENV); had=$$want; fi; \
	test "$$(cat $@ 2>/dev/null)" = "$$had" || echo "$$had" > $@

# Pins that pyproject.toml still allows are kept; make lock UPGRADE=--upgrade takes the newest.
COMPILE = $(UV) pip compile -q --no-config --universal --fork-strategy requires-python --python-version 3.11 \
  --no-emit-index-url --no-emit-find-links --no-annotate --no-header $(UPGRADE) pyproject.toml
UV_IS_HERE = $(UV) --version >/dev/null 2>&1 || { echo "make $@ needs uv: pip install uv"; exit 1; }
lock:
	@$(UV_IS_HERE)
	@$(COMPILE) -o requirements.txt >/dev/null
	@{ echo "# Everything the default run needs, on CPU: Linux and macOS, Python 3.11 to 3.13."; \
	  echo "# Written by make lock (uv pip compile --universal) from pyproject.toml; do not edit."; \
	  echo "# Refresh: make lock; with the newest versions: make lock UPGRADE=--upgrade"; \
	  cat requirements.txt; } > requirements.txt.new && mv requirements.txt.new requirements.txt
	@cp requirements/dev.txt requirements/dev.txt.new 2>/dev/null || true
	@$(COMPILE) --extra dev --constraint requirements.txt -o requirements/dev.txt.new >/dev/null
	@{ echo "# Tests, lint and types beside the default run. Written by make lock; do not edit."; \
	  echo "-r ../requirements.txt"; grep -vxFf requirements.txt requirements/dev.txt.new; } > requirements/dev.txt
	@rm requirements/dev.txt.new

# All requirements files as one environment, for every Python and system: the lock must leave room for the files that
# it does not pin. cuda12.txt and cuda13.txt exclude each other.
resolve:
	@$(UV_IS_HERE)
	@set -e; for cuda in cuda12 cuda13; do \
	  $(UV) pip compile -q --no-config --universal --prerelease disallow --python-version 3.11 requirements.txt \
	    $(filter-out requirements/cuda%,$(wildcard requirements/*.txt)) requirements/$$cuda.txt >/dev/null; done
	@echo "requirements.txt and $(words $(wildcard requirements/*.txt)) files of requirements/ resolve together"

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
