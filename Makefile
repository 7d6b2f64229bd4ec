# Everything runs in the virtual environment .venv, which is made on first use and brought up to date by itself.
# Paths are relative, so the folder may lie anywhere, names with spaces included.

.DEFAULT_GOAL := help

PYTHON ?= python3
PROFILE ?= default
# One process of tests per core, four at most: each takes about 1 GB. PYTEST_FLAGS= runs them one after the other.
PYTEST_FLAGS ?= -n logical --maxprocesses 4 --dist loadgroup
# Further options of `gradlab study`, for example ARGS="--workers 2".
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.stamp
# The stamp holds one line: the installed extras, gradlab's version, and the folder that the environment was made for.
# Nothing is read from an environment whose Python no longer starts.
MADE := $(shell $(BIN)/python -c "" 2>/dev/null && cat $(STAMP) 2>/dev/null)
EXTRAS ?= $(or $(firstword $(MADE)),test)
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' gradlab/__init__.py)
WANTED := $(EXTRAS) $(VERSION) $(CURDIR)

# Results to take the gallery's numbers from; without it the committed ones are drawn.
RESULTS ?=

# What `make bench-peers` installs for PyTorch; plain torch may bring CUDA packages.
TORCH ?= torch

.PHONY: help venv study test slow fidelity figures notebooks bench bench-rules bench-peers bench-gpu lint types format clean force

help: ## list these targets
	@echo "Usage:"
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## make or update the environment (PYTHON=python3.12, EXTRAS=test,cuda)

study: $(STAMP) ## run a study: STUDY=randman_rates [PROFILE=smoke|default|paper] [ARGS=...]
ifeq ($(strip $(STUDY)),)
	@echo "Say which study, for example: make study STUDY=randman_rates. Known studies:" >&2
	@$(BIN)/gradlab studies >&2
	@exit 2
else
	@$(BIN)/gradlab study "$(STUDY)" --profile "$(PROFILE)" $(ARGS)
endif

test: $(STAMP) ## run the fast tests (PYTEST_FLAGS="-k tape")
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

slow: $(STAMP) ## run the slow tests
	@$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

fidelity: $(STAMP) ## measure every rule against its oracles again and write docs/fidelity.md (2 minutes)
	@$(BIN)/python tests/fidelity.py

figures: $(STAMP) ## draw the gallery from its stored numbers (RESULTS=results takes them anew)
	@$(BIN)/python figures/gallery.py $(if $(RESULTS),--results $(RESULTS))

notebooks: $(STAMP) ## write notebooks/*.ipynb from their *.py
	@for f in notebooks/*.py; do $(BIN)/python -m jupytext --quiet --to ipynb --update "$$f" || exit 1; done

bench: $(STAMP) ## times and memory as ratios to the work's floor (ARGS="w1 w6 --widths 128")
	@$(BIN)/python benchmarks/suite.py $(ARGS)

bench-rules: $(STAMP) ## time and memory of each rule's gradient over BPTT's (ARGS="--widths 128")
	@$(BIN)/python benchmarks/suite.py w2 --all $(ARGS)

bench-peers: $(STAMP) ## the same beside other libraries, in environments under build/peers (TORCH=torch==2.13.0)
	@$(BIN)/python benchmarks/peers/install.py --torch "$(TORCH)"
	@$(BIN)/python benchmarks/peers/run.py $(ARGS)

bench-gpu: $(STAMP) ## the same on an NVIDIA card, at most 8 minutes (EXTRAS=test,cuda), into gpu.json
	@$(BIN)/python benchmarks/gpu.py --json gpu.json $(ARGS)

lint: $(STAMP) ## check style (ruff)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(STAMP) ## check types (mypy)
	@$(BIN)/mypy

format: $(STAMP) ## mend style in place (ruff)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove the environment (to make it with another PYTHON) and all caches, never results
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist docs/_build
	find gradlab studies tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A new version, other extras, or a folder that was moved or copied: install again (an editable install in a copied
# folder would go on using the code of the first folder).
ifneq ($(MADE),$(WANTED))
$(STAMP): force
endif

# The stamp is removed first and written last: what was interrupted half-way is made anew.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "No '$(PYTHON)' here. Install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv)" >&2; \
	  echo "or name one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	  echo "gradlab needs Python 3.11 or newer; '$(PYTHON)' is: $$("$(PYTHON)" --version 2>&1 | head -n 1)" >&2; \
	  echo "Name a newer one: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c "import venv, ensurepip" 2>/dev/null || { \
	  v=$$("$(PYTHON)" -c "import sys; print('%d.%d' % sys.version_info[:2])"); \
	  echo "'$(PYTHON)' cannot make virtual environments: its module venv or ensurepip is missing." >&2; \
	  echo "Debian, Ubuntu: apt install python$$v-venv. Then run make again." >&2; exit 1; }
	@echo "Setting up .venv with the extras '$(EXTRAS)': one to five minutes, once; about 1.1 GB on disk."
	@case "$(MADE)" in \
	  *" $(CURDIR)") rm -f $(STAMP) ;; \
	  *) "$(PYTHON)" -m venv --clear .venv ;; \
	esac
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]" || { \
	  echo "The installation failed; the lines above say why. Run make again when that is mended." >&2; exit 1; }
	@echo "$(WANTED)" > $(STAMP)
	@echo "The environment is ready."
