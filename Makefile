# Everything a fresh machine needs: `make test`, `make demo`. Linux or macOS, Python 3.11 or 3.12,
# no accelerator. Any target can be called again: what is done is kept, what was stopped goes on.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help interpreter venv lock audit coverage upgrade-test test-tools tpu-env tpu-tools bench-env bench-tools test lint demo-records demo demo-compare sweep-records clean
.NOTPARALLEL:
export PYTHONUNBUFFERED := 1

# At least 40: configs/masm_demo.py validates on cases 32 to 39.
CASES ?= 40
PYTEST ?=
VENV ?= .venv
TPU_VENV ?= .venv-tpu
BENCH_VENV ?= .venv-bench
UPGRADE_VENV ?= .venv-upgrade
PY := $(VENV)/bin/python
# The first that runs, has a right version and can make environments: a name on the PATH may be a
# shim that only fails, and Debian's python3 cannot make environments without python3-venv.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	>/dev/null 2>&1 && echo $$p && break; done)

NEWEST ?= $(or $(shell for p in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python3.12; do \
	$$p -c 'import ensurepip' >/dev/null 2>&1 && echo $$p && break; done),$(PYTHON))

help:
	@echo "make test          set up $(VENV), then lint and tests; PYTEST=\"-m slow\" runs the slow ones"
	@echo "make demo          set up, simulate CASES=$(CASES) patients, train MASM on the CPU, evaluate: demo/"
	@echo "make demo-compare  the same training without mixers, twice ('late', 'unet'), beside the demo's"
	@echo "make sweep-records simulated patients for the sweeps: demo/coarse"
	@echo "make lint          ruff (rules and format), mypy (types)"
	@echo "make coverage      the tests, and which lines of the package none of them runs"
	@echo "make upgrade-test  the tests with the newest versions that pyproject.toml allows, in $(UPGRADE_VENV)"
	@echo "make audit         ask PyPI for known vulnerabilities of what requirements.lock pins"
	@echo "make venv          set up $(VENV) with requirements.lock; PYTHON=/path/to/python3.12 chooses a Python"
	@echo "make tpu-env       set up $(TPU_VENV): the TPU compiler, for a machine without a TPU"
	@echo "make bench-env     set up $(BENCH_VENV): torch and MONAI, for a comparison with their networks"
	@echo "make clean         remove demo/ and caches; $(VENV), records/ and runs/ stay"

# ---------------------------------------------------------------- environment

interpreter:
	@$(PY) -m pip --version >/dev/null 2>&1 && exit 0; \
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or 3.12 that can make a virtual environment was found" >&2; \
	  echo "  Debian, Ubuntu:  apt install python3 python3-venv" >&2; \
	  echo "  where that is another version, or elsewhere:  make ... PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$($$python --version)"; \
	$$python -m venv "$(VENV)"

# $(call install,FILE,ALL FILES IT READS,about 1.6 GB): once per content of the files.
define install
	@set -o pipefail; \
	sum=$$(cat $(2) | cksum); stamp="$(VENV)/.installed-$(1)"; \
	[ "$$(cat "$$stamp" 2>/dev/null)" = "$$sum" ] && exit 0; \
	echo "installing $(1) into $(VENV): $(3) on disk, some minutes the first time"; \
	$(PY) -m pip install --disable-pip-version-check --no-input -r $(1) \
	  | { grep --line-buffered -E 'Downloading .*\([0-9]{2,}(\.[0-9]+)? [MG]B\)' || true; } || exit 1; \
	echo "$$sum" > "$$stamp"
endef

# By hash; the test tools come after it, and cannot change its versions (requirements-test.txt).
venv: interpreter
	$(call install,requirements.lock,requirements.lock,about 1.1 GB)

# After a change of requirements.txt: all packages that it brings, with the hashes of their files.
lock: interpreter
	$(PY) -m pip install --quiet uv==0.13.9
	$(PY) -m uv pip compile --quiet --universal --python-version=3.11 --generate-hashes \
	  --custom-compile-command="make lock" requirements.txt -o requirements.lock

audit: test-tools
	$(PY) -m scripts.audit

test-tools: venv
	$(call install,requirements-test.txt,requirements.txt requirements-test.txt,about 2 GB (1 GB of it torch; more with CUDA))
	@# The report is tested in a browser: CHROMIUM=/path chooses one, without any the test skips.
	@for b in "$$CHROMIUM" chromium google-chrome; do command -v "$$b" >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium by apt-get, for the test of the report in a browser"; \
	  { apt-get install -y -q --no-install-recommends chromium \
	    || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }; \
	  } >/dev/null 2>&1 || echo "no chromium by apt-get: the browser test will skip"; \
	fi

tpu-env:
	@$(MAKE) --no-print-directory VENV="$(TPU_VENV)" tpu-tools
	@echo "$(TPU_VENV)/bin/python -m masm_jax.benchmark tpu --config=configs/masm_brats.py --topology=v5e:4x4"

tpu-tools: interpreter
	$(call install,requirements-tpu.txt,requirements.txt requirements-tpu.txt,about 1.6 GB)

bench-env:
	@$(MAKE) --no-print-directory VENV="$(BENCH_VENV)" bench-tools
	@echo "$(BENCH_VENV)/bin/python -m masm_jax.benchmark flops"

bench-tools: interpreter
	$(call install,requirements-bench.txt,requirements.txt requirements-bench.txt,about 2 GB (1 GB of it torch; more with CUDA))

# ---------------------------------------------------------------- checks

test: test-tools
	$(MAKE) --no-print-directory lint
	$(PY) -m scripts.audit
	@# Two at a time: compiling, which takes most of it, uses one core. A file stays together, its
	@# tests share what they have trained.
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(PYTEST),,--cov --cov-report=term) $(PYTEST)

# What the tests run of the package, commands in processes of their own included; the lines that none
# runs are named, fewest covered first. Takes longer than `make test`.
coverage: test-tools
	rm -f .coverage .coverage.*
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-config=tests/coverage.ini --cov-report= $(PYTEST); code=$$?; \
	$(PY) -m coverage report --rcfile=tests/coverage.ini --skip-covered --show-missing --sort=cover; exit $$code

# The tests with the newest versions that pyproject.toml allows, on the newest Python at hand.
upgrade-test:
	@$(MAKE) --no-print-directory VENV="$(UPGRADE_VENV)" PYTHON="$(NEWEST)" interpreter
	$(UPGRADE_VENV)/bin/python -m pip install --disable-pip-version-check --no-input --upgrade -e .
	sed -e '/^-r /d' requirements-test.txt > $(UPGRADE_VENV)/test-tools.txt
	$(UPGRADE_VENV)/bin/python -m pip install --disable-pip-version-check --no-input -r $(UPGRADE_VENV)/test-tools.txt
	$(UPGRADE_VENV)/bin/python -m pip list --format=freeze | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|numpy|scipy)=='
	$(UPGRADE_VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: test-tools
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

# ---------------------------------------------------------------- demo

# $(call evaluate,RUN,OUTPUT): unless that was done with the newest checkpoint.
define evaluate
	@if [ $(2)/report.html -nt demo/$(1)/checkpoints ]; then \
	  echo "$(2) is up to date"; \
	else \
	  echo "$(PY) eval.py --workdir=demo/$(1) --split=val --output=$(2)"; \
	  $(PY) eval.py --workdir=demo/$(1) --split=val --output=$(2); \
	fi
endef
CONCAT := ('concat','concat','concat','concat','concat','concat')

demo: demo-records
	@echo; echo "demo, 3 of 4: training; stop it whenever you like, 'make demo' goes on"
	@# Noise that dies away, as in masm_brats.py: the report has maps of what the masks prune.
	$(PY) train.py --config=configs/masm_demo.py --workdir=demo/masm --config.gumbel.quiet=0.75
	@echo; echo "demo, 4 of 4: evaluation of the validation cases"
	$(call evaluate,masm,demo/eval)
	@echo; \
	echo "done. These are results on simulated phantoms, not on BraTS."; \
	echo "  demo/phantoms          the simulated patients, as NIfTI in the layout of BraTS 2021"; \
	echo "  demo/records           the same, prepared for training"; \
	echo "  demo/masm              the run: config.json, metrics.jsonl, curves.png, checkpoints/"; \
	echo "  demo/eval/report.html  all of it to look at: open it in a browser"; \
	echo "  demo/eval              metrics.csv, lesions.csv, summary.json, predictions/ (NIfTI), overlays/, figures/"; \
	echo "next: make demo-compare   the same budget without mixers"

demo-records: venv
	@echo; echo "demo, 1 of 4: $(CASES) simulated patients"
	$(PY) -m masm_jax.phantom --output=demo/phantoms --cases=$(CASES) --spacing=3 --seed=0 --workers=2
	@echo; echo "demo, 2 of 4: records"
	$(PY) -m masm_jax.prepare --input=demo/phantoms --output=demo/records --workers=2

# What configs/sweeps trains on: coarse, so that a run takes two minutes of a core.
sweep-records: venv
	$(PY) -m masm_jax.phantom --output=demo/coarse/phantoms --cases=60 --spacing=4 --seed=0 --workers=2
	$(PY) -m masm_jax.prepare --input=demo/coarse/phantoms --output=demo/coarse/records --workers=2

demo-compare: demo-records
	@echo; echo "late: shared encoder, skips concatenated, no mixers"
	$(PY) train.py --config=configs/masm_demo.py --workdir=demo/late --config.model.mixers="$(CONCAT)"
	$(call evaluate,late,demo/eval-late)
	@echo; echo "unet: modalities concatenated at the input, no mixers"
	$(PY) train.py --config=configs/masm_demo.py --workdir=demo/unet --config.model.mixers="()"
	$(call evaluate,unet,demo/eval-unet)
	@echo; echo "mean Dice on the validation phantoms, not on BraTS; one seed, a few cases: no ranking"
	@$(PY) -c "$$TABLE" demo/eval demo/eval-late demo/eval-unet

define TABLE
import json, pathlib, sys
for folder in map(pathlib.Path, sys.argv[1:]):
    if not (folder / "summary.json").is_file():
        print(f"{folder}: not there, run make demo")
        continue
    summary = json.loads((folder / "summary.json").read_text())
    dice = "  ".join(f"{n} {r['dice']['mean']:.3f}" for n, r in summary["regions"].items())
    print(f"{folder!s:<16}  {dice}  mean {summary['average']['dice']:.3f}  ({summary['cases']} cases)")
endef
export TABLE

clean:
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage* build ./*.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
