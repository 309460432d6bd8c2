# The targets use a virtual environment, .venv, which is made at first use. On a host whose Python already has torch and
# torch_npu, use that one instead: `make demo VENV=`.
VENV ?= .venv
PYTHON ?= python3
ifeq ($(VENV),)
  RUN := $(PYTHON)
  INSTALLED := .installed
else
  RUN := $(VENV)/bin/python
  INSTALLED := $(VENV)/.installed
endif
DEMO_OUTPUT ?= demo_output
# The NPU tests have a separate environment with torch and torch_npu of the same version. NPU_PAIR=2.9 selects the versions
# in tests/npu/constraints-2.9.txt.
NPU_PAIR ?=
NPU_VENV ?= .venv-npu$(NPU_PAIR:%=-%)
NPU_RUN := $(NPU_VENV)/bin/python
NPU_CONSTRAINTS := tests/npu/constraints$(NPU_PAIR:%=-%).txt
NPU_INSTALL := PIP_CONSTRAINT=$(CURDIR)/$(NPU_CONSTRAINTS) $(NPU_RUN) -m pip install

# The floor tests run with the oldest versions that setup.py allows, on the oldest Python that is installed.
FLOOR_VENV ?= .venv-floor
FLOOR_RUN := $(FLOOR_VENV)/bin/python
FLOOR_PYTHONS := python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10) python3.11 python3.12 $(PYTHON)
# Only some of tests/parity: timm before 1.0.23 initializes every model, which takes long for all of them.
FLOOR_TESTS := tests/unit $(addprefix tests/parity/test_,losses_parity.py schedules_and_groups.py token_ids.py val_transform.py)
FLOOR_PYTHON ?= $(shell for name in $(FLOOR_PYTHONS); do $$name -m venv -h >/dev/null 2>&1 && echo $$name && break; done)

.PHONY: help install peer demo test test-npu test-floor test-compat test-clip-benchmark lint check-pins bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED)  ## make .venv (or use the environment in VENV=) and install the package with all extras

$(INSTALLED): setup.py requirements.txt
ifneq ($(VENV),)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
endif
	$(RUN) -m pip install --editable '.[training,export,demo,test,lint]'
	touch $@

demo: install  ## train a small CLIP on handwritten digits and plot the results (under 5 minutes on 2 cores)
	$(RUN) demo/digits.py --output $(DEMO_OUTPUT)

test: install  ## run the tests (20 minutes on 2 cores, no network)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not npu"

test-npu: $(NPU_VENV)/.installed  ## run the NPU tests on an emulated CANN (under 12 minutes on 2 cores)
	$(NPU_RUN) tests/npu/emulator/build.py
	$(NPU_RUN) -m pytest -m npu tests/npu

test-floor: $(FLOOR_VENV)/.installed  ## run the unit tests with the oldest supported torch (2.6), timm, transformers, ... (30 minutes)
	OMP_NUM_THREADS=1 $(FLOOR_RUN) -m pytest -m "not npu" $(FLOOR_TESTS)

$(FLOOR_VENV)/.installed: setup.py requirements.txt tests/floor/constraints.txt
	test -x $(FLOOR_RUN) || $(FLOOR_PYTHON) -m venv $(FLOOR_VENV)
	PIP_CONSTRAINT=$(CURDIR)/tests/floor/constraints.txt $(FLOOR_RUN) -m pip install --editable '.[training,export,test]'
	touch $@

peer: .peer/.installed  ## install open_clip_torch 3.3.0 into the folder .peer, for comparisons

.peer/.installed: $(INSTALLED) tests/compat/requirements.txt
	PIP_CONSTRAINT= $(RUN) -m pip install --quiet --no-deps --upgrade --target .peer --requirement tests/compat/requirements.txt
	touch $@

test-compat: peer  ## run programs written for open_clip with open_clip_torch 3.3.0 and with this package, and 3.3.0's tests
	$(RUN) tests/compat/compare.py
	OMP_NUM_THREADS=1 $(RUN) tests/compat/run_upstream_tests.py

test-clip-benchmark: install  ## check that clip_benchmark gives the same metrics as this package (downloads 105 MB)
	$(RUN) -m pip install --quiet --no-deps --upgrade --target .clip_benchmark --requirement tests/clip_benchmark/requirements.txt
	$(RUN) -m pytest tests/clip_benchmark

$(NPU_VENV)/.installed: setup.py tests/npu/requirements.txt $(NPU_CONSTRAINTS)
	$(PYTHON) tests/npu/emulator/build.py --check
	test -x $(NPU_RUN) || $(PYTHON) -m venv $(NPU_VENV)
	$(NPU_INSTALL) torch
	$(NPU_INSTALL) --no-deps torch_npu torchvision timm
	$(NPU_INSTALL) --requirement tests/npu/requirements.txt
	$(NPU_INSTALL) --no-deps --no-build-isolation --editable .
	cp tests/npu/shim/sitecustomize.py "$$($(NPU_RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	touch $@

lint: install  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check-pins: install  ## ask pip what it would install for each pair of torch and torch_npu (needs a package index)
	env --unset=PIP_CONSTRAINT $(RUN) tests/npu/dry_run_install.py

bench: peer  ## run the benchmarks against open_clip_torch 3.3.0
	$(RUN) benchmarks/run.py

clean:  ## remove everything that the other targets make
	rm -rf .venv .venv-npu* $(NPU_VENV) $(FLOOR_VENV) .peer .peer_tests .clip_benchmark .installed build dist demo_output benchmarks/.scratch src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
