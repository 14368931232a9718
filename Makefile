# Two commands do everything: `make demo` and `make test`. Each installs what it needs into .venv first.
PYTHON  ?= python3
WORKDIR ?= runs/digits
CONFIG  ?= configs/digits_cpu.py

BIN := .venv/bin
RUN := $(BIN)/python -m
ARGS := --config=$(CONFIG) --workdir=$(WORKDIR)

.PHONY: demo test test-all ablation clean

# Large arrays on huge pages (Linux): a training step on a CPU takes an eighth less time.
demo ablation: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

demo: .venv/.installed  ## cold start, AEPO, evaluation, export, report: the whole of ARES on handwritten digits
	$(RUN) ares_jax.cold_start $(ARGS)
	$(RUN) ares_jax.train $(ARGS)
	$(RUN) ares_jax.evaluate $(ARGS)
	$(RUN) ares_jax.convert $(ARGS)
	$(RUN) ares_jax.report $(ARGS)

test: .venv/.installed-test  ## lint, types, tests; docs/testing.md
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(RUN) pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(PYTEST)

test-all: export ARES_TESTS = all
test-all: test  ## the slow tests too, and programs compiled as users have them (an hour)

ablation: .venv/.installed  ## the table of the paper's ablation, 3 seeds a row (hours)
	$(RUN) benchmarks.ablation $(ARGS)

clean:  ## forget the demo's run; the installation stays
	rm -rf $(WORKDIR)

.venv/bin/python:
	$(PYTHON) -m venv .venv || ($(PYTHON) -m pip install virtualenv && $(PYTHON) -m virtualenv .venv)

.venv/.installed: requirements.txt requirements.lock | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -r requirements.txt
	touch $@

# XLA's compiler for GPUs is 1.6 GB on disk; without it the tests that want it are skipped.
.venv/.installed-test: requirements-test.txt requirements-gpu-compiler.txt requirements.txt requirements.lock | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -r requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-gpu-compiler.txt || \
	  echo "no compiler for GPUs: most of tests/parallel/test_gpu_compiler.py is skipped" >&2
	touch $@ .venv/.installed
