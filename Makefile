# `make` lists what there is. Set-up happens by itself, once, and again when pyproject.toml or constraints.txt change.
.DEFAULT_GOAL := help
.SUFFIXES:
MAKEFLAGS += --no-print-directory
SHELL := /bin/sh

SWEEP   ?= local
SIZE    ?= all
ARM     ?= all
CLUSTER ?= local
RUNS    ?= runs
RESULTS ?= results
PORT    ?= 5000
# Empty: found by themselves. PROFILE is a row of slurm/resources.yaml, RESOURCES a file with rows of your own over it,
# PYTHON an interpreter, 3.10 or newer.
PROFILE   ?=
RESOURCES ?=
PYTHON    ?=
# RETRY=1 tries failed runs again; MAX_HOURS=2 refuses a plan that takes longer; MAX_GPU_HOURS=100 asks before a sweep
# uses more; DRY_RUN=1 prints what would go to sbatch; WATCH=1 keeps `make status` live.
RETRY     ?=
MAX_HOURS ?=
MAX_GPU_HOURS ?=
DRY_RUN   ?=
WATCH     ?=

VENV := .venv
PY   := $(VENV)/bin/python
BASE := $(VENV)/.base
TRAIN := $(VENV)/.train
DEV  := $(VENV)/.dev
CHOICE := --size $(SIZE) --arm $(ARM) --cluster $(CLUSTER) --runs $(RUNS) --results $(RESULTS) \
	$(if $(PROFILE),--profile $(PROFILE)) $(if $(RESOURCES),--resources $(RESOURCES)) $(if $(MAX_HOURS),--max-hours $(MAX_HOURS))
LAUNCH := $(PY) -m slurm.launch
SUBMIT := $(if $(RETRY),--retry-failed) $(if $(MAX_GPU_HOURS),--max-gpu-hours $(MAX_GPU_HOURS)) $(if $(DRY_RUN),--dry-run)
TABLE  := $(RESULTS)/$(SWEEP)/runs.csv
# One thread a test process: several of them share the cores.
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

.PHONY: help sweep smoke plan status cancel collect laws report ui test test-cluster check bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  For example: make sweep SIZE=50K,80K ARM=continuous-random,discrete-raster"
	@echo "               make plan SWEEP=fluid        make status WATCH=1        make sweep CLUSTER=slurm"

sweep: $(TRAIN)  ## train, evaluate, collect, fit and report what is missing of SWEEP (SIZE= ARM= CLUSTER=)
	@$(LAUNCH) submit $(SWEEP) $(CHOICE) $(SUBMIT)

smoke: $(TRAIN)  ## the same chain in minutes: it shows that the plumbing holds
	@$(LAUNCH) submit smoke $(CHOICE) $(SUBMIT)

plan: $(BASE)  ## what SWEEP would run and what it would cost; spends nothing
	@$(LAUNCH) plan $(SWEEP) $(CHOICE)

status: $(BASE)  ## one table of all runs of SWEEP
	@$(LAUNCH) status $(SWEEP) $(CHOICE) $(if $(WATCH),--watch)

cancel: $(TRAIN)  ## stop all of SWEEP, here and in SLURM's queue; what it reached is kept
	@$(LAUNCH) cancel $(SWEEP) $(CHOICE)

collect: $(BASE)  ## finished runs of SWEEP to RESULTS/SWEEP/runs.csv
	@$(LAUNCH) collect $(SWEEP) $(CHOICE)

laws: $(BASE)  ## fit the laws to the table of SWEEP and write its report
	@$(PY) analysis/fit_laws.py $(TABLE) --out $(RESULTS)/$(SWEEP)

report: $(BASE)  ## draw the report of SWEEP again from its laws.json
	@$(PY) analysis/report.py $(RESULTS)/$(SWEEP)/laws.json

ui: $(TRAIN)  ## MLflow's pages of all runs, on this machine only (PORT=)
	@test -f $(RUNS)/mlflow/mlflow.db || { echo "$(RUNS)/mlflow/mlflow.db: not there yet; start a sweep: make smoke" >&2; exit 2; }
	@echo "open http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning (in the page's other mode, GenAI, no run is shown)"
	@$(PY) -m mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1 --backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow/mlflow.db

test: $(DEV)  ## the tests; no GPU, no network, no apt
	@$(TEST) -m "not cluster"

test-cluster: $(DEV)  ## tests against real services (sets up what it needs, with apt)
	@sh tests/cluster/run.sh $(PY)

check: $(DEV)  ## lint, types, import rules, house rules
	@$(PY) -m ruff check .
	@$(PY) -m pyright --pythonpath $(PY)
	@$(VENV)/bin/lint-imports --no-logo
	@$(PY) tests/house.py

bench: $(DEV)  ## every benchmark that this machine can run, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; $(PY) $$script || [ $$? -eq 2 ] || exit 1; done

clean:  ## remove what make made; asks before runs and results
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@for there in $(RUNS) $(RESULTS); do \
	  if [ -d "$$there" ]; then \
	    answer=n; \
	    [ -t 0 ] && { printf 'Delete %s (%s)? [y/N] ' "$$there" "$$(du -sh "$$there" | cut -f1)"; read -r answer; }; \
	    case "$$answer" in y|Y|yes) rm -rf "$$there";; *) echo "kept $$there";; esac; \
	  fi; \
	done

# Set-up. A statistician's base has no torch; each larger one holds the smaller ones.
TRAIN_SET := -e '.[train]'
DEV_SET := -e '.[train,dev]'
define install
	@echo "setting up $(VENV) for $(1): about $(2), once"
	@$(PY) -m pip install -qq -c constraints.txt $(3)
endef

$(PY):
	@sh -c 'for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10; do \
	  if "$$python" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null; then \
	    "$$python" -m venv $(VENV) >/dev/null 2>&1 && exit 0; \
	    rm -rf $(VENV); "$$python" -m venv --without-pip $(VENV) && "$$python" -m pip -q --python $(PY) install pip && exit 0; \
	    rm -rf $(VENV); echo "$$python cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; \
	  fi; \
	done; \
	echo "Python 3.10 or newer is needed, found: $$(python3 --version 2>&1). Name one: make PYTHON=/usr/bin/python3.11 .." >&2; \
	exit 2'

$(BASE): pyproject.toml constraints.txt | $(PY)
	$(call install,planning and fitting,1 minute,-e .)
	@touch $@

$(TRAIN): pyproject.toml constraints.txt | $(PY)
	$(call install,training,3 minutes,$(TRAIN_SET))
	@touch $(BASE) $@

$(DEV): pyproject.toml constraints.txt | $(PY)
	$(call install,development,4 minutes,$(DEV_SET))
	@touch $(BASE) $(TRAIN) $@
