# layerfold developer commands. A fresh clone needs only `make quickstart` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3.11
PY := .venv/bin/python
EXTRAS ?= tflite,onnx,weights,data,dev
comma := ,
# Other extras are another installation: the stamp names them.
STAMP := .venv/.installed-$(subst $(comma),-,$(EXTRAS))
# A machine with an NVIDIA driver gets whatever torch build the package index serves; others the pinned CPU set.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)

.PHONY: install quickstart test test-slow lint types clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt requirements-samples.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: $(PYTHON) not found: install Python 3.11 or run 'make $(MAKECMDGOALS) PYTHON=/path/to/python3'"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade 'setuptools>=77' wheel
	$(PY) -m pip install --quiet $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	$(PY) -m pip install --quiet --no-deps -r requirements-samples.txt
	touch $@

quickstart: install
	.venv/bin/layerfold run quickstart

test: install
	$(PY) -m pytest -m "not slow" --durations=25

test-slow: install
	$(PY) -m pytest -m slow

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: install
	.venv/bin/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
