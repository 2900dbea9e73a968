# Two commands for newcomers: `make demo` and `make test`. Both set themselves up.
PYTHON ?= python3
# Exact versions of everything; empty for whatever pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
INSTALLED := .venv/installed

# Where `make install` puts the program, and what it lays beside it for systemd.
PREFIX := /opt/inspectd
UNITS := $(DESTDIR)/usr/local/lib

# opencv-python wants the system's libGL; where that is missing its twin without windows serves. $(1): a folder bin
headless = $(1)/python -c 'import cv2' 2>/dev/null || $(1)/pip install --quiet --disable-pip-version-check \
	  --force-reinstall --no-deps opencv-python-headless==$$($(1)/pip show opencv-python | sed -n 's/^Version: //p')

.PHONY: venv demo test test-long chaos soak swap check lint fix results bench bench-peers install uninstall

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "inspectd needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up .venv; the first time this downloads PyTorch, some minutes."
	@$(PYTHON) -m venv .venv \
	  || { echo "the venv module is missing; install it, on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	@$(call headless,$(BIN))
	@touch $@

# The main job on rendered parts, or on yours in MVTec layout: make demo DATA=folder
demo: $(INSTALLED)
	$(BIN)/python -m demo $(if $(DATA),--data "$(DATA)")

# A worker more than there are cores, for tests wait a lot; each with one thread of PyTorch, since two that spin beside each
# other are slower than one. The files with few and long tests come first, so that no worker is left alone with them.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" --numprocesses $$(($$(nproc) + 1)) --dist loadfile \
	  --no-loadscope-reorder

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

# Broker, daemon and disk struck down while 2,000 parts come in: minutes. Needs Mosquitto; as root it fills a disk, too.
# make chaos CHAOS="--parts 500 --kills 5 --seed 1"
chaos: $(INSTALLED)
	$(BIN)/python -m tests.system.chaos $(CHAOS)

# A day of parts, and models that change under load: memory, files, latency. Half an hour, and minutes.
# make soak SOAK="--parts 10000 --plot soak.png"
soak: $(INSTALLED)
	$(BIN)/python -m tests.system.soak $(SOAK)

swap: $(INSTALLED)
	$(BIN)/python -m tests.system.swap $(SWAP)

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
results: $(INSTALLED)
	$(BIN)/inspectd compare --data "$(INSPECTD_DATA)" --out build/results

# How fast models are on this machine, by each engine, for docs/performance.md: minutes. Of the models in the folder
# INSPECTD_BENCH_MODELS, or of one that is hardly trained, for that decides nothing about speed; beside anomalib, if it is
# there. make bench BENCH="--beside --whole-path --rounds 5"
MODELS := $(or $(wildcard $(INSPECTD_BENCH_MODELS:%=%/*/manifest.json)),build/bench/lite0/manifest.json)
PEER := build/peers/bin/python

bench: $(INSTALLED) $(MODELS)
	@set -e; for manifest in $(MODELS); do model=$$(dirname $$manifest); $(BIN)/inspectd bench --model $$model \
	  --json build/bench/$$(basename $$model).json $(addprefix --peer ,$(wildcard $(PEER))) $(BENCH); done

build/bench/lite0/manifest.json: | $(INSTALLED)
	@$(BIN)/python -c 'from pathlib import Path; from demo.parts import write_dataset; \
	  write_dataset(Path("build/bench/parts"), good=60, test_good=1, per_kind=1, seed=0)'
	@$(BIN)/inspectd train --good build/bench/parts/train/good --out build/bench/lite0 --steps 40
	@$(BIN)/inspectd export --model build/bench/lite0 --good build/bench/parts/train/good
	@sed -n 's/^ *"id": "\(.*\)",*/\1/p' build/bench/lite0/calibration.proposed.json \
	  | xargs -I ID $(BIN)/inspectd calibrations accept ID --model build/bench/lite0

# anomalib in a place of its own, beside the same PyTorch: `make bench` then measures it too.
bench-peers: $(INSTALLED)
	@$(PYTHON) -m venv build/peers
	@build/peers/bin/pip install --quiet --disable-pip-version-check anomalib==2.7.0 onnx onnxscript openvino \
	  $$($(BIN)/pip freeze | grep -E '^(torch|torchvision|openvino)==' | sed 's/+.*//')

# The daemon as a service, docs/service.md; as root. Again to upgrade: what runs keeps its own program until it is
# restarted, and a failure changes nothing. With DESTDIR, for who makes packages, all but the program.
install:
	@[ "$(CURDIR)" != "$(PREFIX)" ] || { echo "$(PREFIX) is for the program; move this repository elsewhere"; exit 1; }
ifeq ($(DESTDIR),)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.base_prefix.startswith(("/root", "/home")))' \
	  || { echo "Services need Python 3.11 or newer outside of /home and /root: make install PYTHON=/usr/bin/python3"; exit 1; }
	@echo "Installing the program in $(PREFIX); the first time this downloads PyTorch, some minutes."
	@set -e; umask 022; new=$(PREFIX)/venv-$$(date +%Y%m%dT%H%M%S); old=$$(readlink $(PREFIX)/.venv || true); \
	  trap 'rm -rf $$new' EXIT; mkdir -p $(PREFIX); $(PYTHON) -m venv $$new; \
	  $$new/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) '.[camera,openvino]'; \
	  $(call headless,$$new/bin); $$new/bin/inspectd --help >/dev/null; \
	  ln -sfn $$new $(PREFIX)/.venv.new; mv -T $(PREFIX)/.venv.new $(PREFIX)/.venv; trap - EXIT; \
	  for each in $(PREFIX)/venv-*; do case $$each in $$new|$$old) ;; \
	    *) grep -qsF "$$each/" /proc/[0-9]*/maps || ls -l /proc/[0-9]*/exe 2>/dev/null | grep -qF " $$each/" || rm -rf $$each;; \
	    esac; done
endif
	@install -d $(UNITS)/systemd/system $(UNITS)/sysusers.d $(UNITS)/tmpfiles.d $(DESTDIR)$(PREFIX)/docs
	@install -m 644 systemd/inspectd.service systemd/inspectd@.service systemd/inspectd.target systemd/inspectd.slice \
	  $(UNITS)/systemd/system
	@install -m 644 systemd/inspectd.sysusers $(UNITS)/sysusers.d/inspectd.conf
	@install -m 644 systemd/inspectd.tmpfiles $(UNITS)/tmpfiles.d/inspectd.conf
	@install -m 644 config/inspectd.toml systemd/inspectd-gpu.conf systemd/inspectd-usb.conf $(DESTDIR)$(PREFIX)
	@install -m 644 docs/*.md $(DESTDIR)$(PREFIX)/docs
ifeq ($(DESTDIR),)
	@systemd-sysusers inspectd.conf && systemd-tmpfiles --create inspectd.conf
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo "Installed. Next, for a line of the name line1 ($(PREFIX)/docs/service.md):"
	@echo "  cp $(PREFIX)/inspectd.toml /etc/inspectd/line1.toml     # every option, explained: edit it"
	@echo "  systemctl enable --now inspectd@line1 && systemctl status inspectd@line1"
	@echo "After an upgrade: systemctl restart inspectd.target         # no part is lost"
endif

# All but what is yours: configurations, models, parts, passwords, and verdicts that no broker has taken.
uninstall:
	@if [ -d /run/systemd/system ]; then systemctl stop inspectd.target inspectd.service 'inspectd@*.service'; \
	  systemctl disable --quiet inspectd.service inspectd@.service; fi 2>/dev/null || true
	@rm -rf $(PREFIX)/.venv $(PREFIX)/venv-* $(PREFIX)/docs $(PREFIX)/inspectd.toml $(PREFIX)/inspectd-*.conf \
	  $(UNITS)/systemd/system/inspectd.service $(UNITS)/systemd/system/inspectd@.service \
	  $(UNITS)/systemd/system/inspectd.target $(UNITS)/systemd/system/inspectd.slice \
	  $(UNITS)/sysusers.d/inspectd.conf $(UNITS)/tmpfiles.d/inspectd.conf
	@if [ -d $(PREFIX) ]; then rmdir --ignore-fail-on-non-empty $(PREFIX); fi
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo "Uninstalled. Yours to delete: /etc/inspectd, /srv/inspectd, /etc/credstore/inspectd*, /var/lib/private/inspectd"
