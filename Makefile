# make demo   convert the bundled teacher, distil it, compare 2 steps with 50: runs/demo/index.html
# make test   linter, formatter, test suite; then the tests that need no torch on Python 3.12, if it is there
#
# Both make their own virtual environments. PYTHON names the Python to use, 3.11 or newer.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
PINS = $(wildcard tests/constraints-$(VERSION).txt)
# The first Python 3.12 that starts, pyenv's included
PYTHON312 := $(shell for p in python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python); do \
	if $$p -c "" 2>/dev/null; then echo $$p; break; fi; done)

.PHONY: demo test clean

demo: .venv/demo.installed
	.venv/bin/arcflow demo

test: .venv/test.installed $(if $(PYTHON312),.venv-3.12/test.installed)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile
ifneq ($(PYTHON312),)
	.venv-3.12/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"
endif

.venv/bin/python:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'arcflow_jax needs Python 3.11 or newer'"
	$(PYTHON) -m venv .venv

.venv/demo.installed: .venv/bin/python setup.py
	.venv/bin/pip install --quiet --editable . $(addprefix --constraint ,$(PINS))
	touch $@

# With the PyTorch twins of the parity tests, which the library itself does not need
.venv/test.installed: .venv/bin/python setup.py $(PINS)
	.venv/bin/pip install --quiet --editable ".[test,parity]" $(addprefix --constraint ,$(PINS))
	touch $@

.venv-3.12/test.installed: setup.py tests/constraints-3.12.txt
	$(PYTHON312) -m venv .venv-3.12
	.venv-3.12/bin/pip install --quiet --editable ".[test]" --constraint tests/constraints-3.12.txt
	touch $@

clean:
	rm -rf .venv .venv-3.12 runs build *.egg-info
