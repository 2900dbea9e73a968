# Two commands for newcomers: `make demo` and `make test`. Both set themselves up.
PYTHON ?= python3
# Exact versions of everything; empty for whatever pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: venv demo test test-long chaos check lint fix bench

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "inspectd needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv; the first time this downloads PyTorch, some minutes."
	@$(PYTHON) -m venv .venv \
	  || { echo "the venv module is missing; install it, on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	@# opencv-python wants the system's libGL; where that is missing its twin without windows serves.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check \
	  --force-reinstall --no-deps opencv-python-headless==$$($(BIN)/pip show opencv-python | sed -n 's/^Version: //p')
	@touch $@

# The main job on rendered parts, or on yours in MVTec layout: make demo DATA=folder
demo: $(INSTALLED)
	$(BIN)/python -m demo $(if $(DATA),--data "$(DATA)")

# One worker a core, each with one thread of PyTorch: two that spin beside each other are slower than one.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" --numprocesses logical --dist loadfile

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

# Broker, daemon and disk struck down while 2,000 parts come in: minutes. Needs Mosquitto; as root it fills a disk, too.
# make chaos CHAOS="--parts 500 --kills 5 --seed 1"
chaos: $(INSTALLED)
	$(BIN)/python -m tests.system.chaos $(CHAOS)

check: lint test

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Figures for docs/results.md: hours. Needs INSPECTD_DATA, a folder of categories in any known layout.
bench: $(INSTALLED)
	$(BIN)/inspectd compare --data "$(INSPECTD_DATA)" --out build/results
