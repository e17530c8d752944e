# make demo    the whole job on a small real model, on a CPU
# make test    the whole test suite
# make lint    style, types, import contracts, lines of code
#
# Each creates .venv the first time. PYTHON chooses the interpreter, JOBS the number of test processes.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check

# Two processes share the cores: one thread each, and no spinning while they wait.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: demo test lint env clean

demo: env
	$(RUN)/mmgraft demo

# MMGRAFT_GOLDEN, the folder of published results, is passed on; without it parity tests are skipped.
test: env $(VENV)/.test-installed
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -n $(JOBS) --dist loadgroup -q

lint: env
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright --pythonpath $(RUN)/python
	$(RUN)/lint-imports
	$(RUN)/python tests/support/lines_of_code.py

env: $(VENV)/.installed

# torch comes first and alone: a pinned build that is already there is not replaced by a larger one.
$(VENV)/.installed: pyproject.toml constraints.txt demo-packages.txt
	@$(PYTHON) -c 'import sys; sys.exit("mmgraft needs Python 3.10 or newer; set PYTHON=" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev,4bit,gguf,eval,data]'
	$(PIP) install -q --no-deps -r demo-packages.txt
	@touch $@

$(VENV)/.test-installed: test-packages.txt $(VENV)/.installed
	$(PIP) install -q --no-deps -r test-packages.txt
	@touch $@

clean:
	rm -rf $(VENV)
