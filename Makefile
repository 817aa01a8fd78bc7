# One environment in .venv, then: make demo, make test, make test-all, make lint, make clean.
#
#   make demo FRESH=1           a new run folder instead of the finished run
#   make demo TORCH=torch==2.11 another torch (also a path to a wheel) than the pinned one; it stays for later calls
#   make test CONSTRAINTS=FILE  another set of pinned versions (empty: none)
#   make test PYTHON=python3.12 another interpreter (3.11 or 3.12)
#   make test JOBS=8            tests at a time (many start two or four processes of their own)

VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
CHOSEN_TORCH := $(shell cat $(VENV)/torch.txt 2>/dev/null)
TORCH ?= $(or $(CHOSEN_TORCH),torch)
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell \
	$(p) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13)' 2>/dev/null && echo $(p))))
BIN := $(VENV)/bin
JOBS ?= 2
# One thread for each process, as the launcher gives them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15 --durations-min=5
# Files at a time, in their order: whole runs, which take long, come before the small tests.
SEVERAL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Tests whose processes talk to each other run first and alone: beside others they take several times as long.
define run_tests
	$(if $(ARGS),$(PYTEST) $(SEVERAL) $(1) $(ARGS),failed=0; \
	$(PYTEST) $(1) tests/distributed || failed=1; \
	$(PYTEST) $(SEVERAL) $(1) --ignore tests/distributed tests || failed=1; \
	exit $$failed)
endef
STAMP := $(VENV)/.installed
# Python compiles what it imports by itself; pip would compile everything, which takes longer than the rest. It must then
# be allowed to keep that: else each of many processes compiles torch and DeepSpeed anew, 12 seconds of processor time.
unexport PYTHONDONTWRITEBYTECODE
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile $(if $(CONSTRAINTS),--constraint $(VENV)/constraints.txt)

.PHONY: demo test test-all lint install clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(if $(FRESH),--fresh)

test: $(STAMP)
	$(call run_tests,-m "not slow")

test-all: $(STAMP)
	$(call run_tests,)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck $(wildcard docker/*.sh launcher/*/*.sh launcher/*/*.sbatch)
	$(BIN)/yamllint --strict docker launcher
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

install: $(STAMP)

# A torch that was asked for, other than the one that is there, is installed; one that is not named stays.
ifneq ($(filter command environment,$(origin TORCH)),)
ifneq ($(TORCH),$(CHOSEN_TORCH))
$(STAMP): always
endif
endif
.PHONY: always

# torch first and alone: what needs it later finds it, and the wanted build is not replaced. The stamp is made last, so
# an install that failed is tried again, and one that succeeded is not repeated (the next call needs no network).
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; say which with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(CONSTRAINTS),$(if $(filter torch,$(TORCH)),cat,grep -v '^torch==') $(CONSTRAINTS) > $(VENV)/constraints.txt)
	$(BIN)/python -m pip install $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	echo "$(TORCH)" > $(VENV)/torch.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find moe_train tests tools launcher benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
