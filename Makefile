# make demo    the whole job on a small real model, on a CPU
# make test    the whole test suite
# make lint    style, types, import contracts, lines of code
# make oldest  a part of the tests with the oldest transformers that pyproject.toml allows
# make engines exports in the servers that people run: llama.cpp and vLLM
# make docs    the pages and the Python reference as HTML, in build/docs
#
# Each creates .venv the first time (docs also .venv-docs, oldest also .venv-oldest, engines only
# .venv-engines). PYTHON chooses the interpreter, JOBS the number of test processes.

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
OLDEST_VENV ?= .venv-oldest
ENGINES_VENV ?= .venv-engines
JOBS ?= 2
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check

# Two processes share the cores: one thread each, and no spinning while they wait.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# What transformers can change under mmgraft: golden data, towers, exports, caches, generation, a
# training, and every invariant of some architectures.
OLDEST_TESTS := tests/test_oldest.py tests/test_reference_golden.py tests/published/test_official_parity.py \
	tests/vision tests/export/test_llava_stock.py tests/model/test_seen_features.py \
	tests/model/test_cache.py tests/training/test_resume.py
OLDEST_BASES := llama or qwen3 or gemma3 or phi3 or bloom
OLDEST_INVARIANTS := $(wildcard tests/model/test_invariants_*.py)

.PHONY: demo test lint oldest engines docs env clean

demo: env
	$(RUN)/mmgraft demo

# MMGRAFT_GOLDEN, the folder of published results, is passed on; without it parity tests are skipped.
test: env $(VENV)/.test-installed
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -n $(JOBS) --dist loadgroup -q

# MMGRAFT_OLDEST=1: tests/test_oldest.py fails where another transformers is imported.
oldest: env $(OLDEST_VENV)/.installed
	$(ONE_THREAD) HF_HUB_OFFLINE=1 MMGRAFT_OLDEST=1 $(OLDEST_VENV)/bin/python -m pytest -n $(JOBS) \
		--dist loadgroup -q $(OLDEST_TESTS)
	$(ONE_THREAD) HF_HUB_OFFLINE=1 MMGRAFT_OLDEST=1 $(OLDEST_VENV)/bin/python -m pytest -n $(JOBS) \
		--dist loadgroup -q $(OLDEST_INVARIANTS) tests/model/test_generation.py -k "$(OLDEST_BASES)"

# MMGRAFT_ENGINES=1: tests/engines is collected, and fails where an engine is missing.
engines: $(ENGINES_VENV)/.installed
	$(ENGINES_VENV)/bin/python tests/support/chromium.py
	$(ONE_THREAD) HF_HUB_OFFLINE=1 MMGRAFT_ENGINES=1 $(ENGINES_VENV)/bin/python -m pytest -q tests/engines

lint: env
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright --pythonpath $(RUN)/python
	$(RUN)/lint-imports
	$(RUN)/python tests/support/lines_of_code.py

# Warnings and broken links fail; so does a page that would fetch something when it is opened.
docs: env $(DOCS_VENV)/.installed
	rm -rf build/docs
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(DOCS_VENV)/bin/python -m sphinx -q -W --keep-going docs build/docs
	$(DOCS_VENV)/bin/python docs/fetches.py build/docs

env: $(VENV)/.installed

# torch comes first and alone: a pinned build that is already there is not replaced by a larger one.
$(VENV)/.installed: pyproject.toml constraints.txt demo-packages.txt
	@$(PYTHON) -c 'import sys; sys.exit("mmgraft needs Python 3.10 or newer; set PYTHON=" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev,4bit,gguf,eval,data,serve]'
	$(PIP) install -q --no-deps -r demo-packages.txt
	@touch $@

$(VENV)/.test-installed: test-packages.txt $(VENV)/.installed
	$(PIP) install -q --no-deps -r test-packages.txt
	@touch $@

# Sphinx lives apart and sees the packages of $(VENV): torch is not installed a second time.
$(DOCS_VENV)/.installed: docs-packages.txt $(VENV)/.installed
	@$(RUN)/python -c 'import sys; sys.exit("make docs needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(RUN)/python -m venv $(DOCS_VENV)
	@$(RUN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(DOCS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r docs-packages.txt
	@touch $@

# The packages of $(OLDEST_VENV) come first; those of $(VENV) are seen behind them.
$(OLDEST_VENV)/.installed: oldest-packages.txt $(VENV)/.installed
	$(RUN)/python -m venv $(OLDEST_VENV)
	@$(RUN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r oldest-packages.txt
	@touch $@

# An environment of its own: engines ask for other releases than those of $(VENV).
$(ENGINES_VENV)/.installed: engines-packages.txt plugins/vllm/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("make engines needs Python 3.11 or newer; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r engines-packages.txt
	$(ENGINES_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps -e . -e plugins/vllm
	$(ENGINES_VENV)/bin/python tests/support/prepare_vllm.py
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(OLDEST_VENV) $(ENGINES_VENV) build/docs
