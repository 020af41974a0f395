# make demo    converts the bundled teacher, distils it, compares 2 steps with 50: runs/demo/index.html
# make test    make check, then the test suite, then on Python 3.12 and 3.13, where they are, a share of it (see below)
# make check   linter, formatter and type checker, in seconds
# make docs    the site, site/index.html, from docs/; fails on a broken link or a name that does not exist
#
# Each makes its own virtual environments. PYTHON names the Python to use, 3.11 or newer.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
PINS = $(wildcard tests/constraints-$(VERSION).txt)
# The first Python of a version that starts, pyenv's included
find_python = $(shell for p in python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1)*/bin/python); do \
	if $$p -c "" 2>/dev/null; then echo $$p; break; fi; done)
PYTHON3.12 := $(call find_python,3.12)
PYTHON3.13 := $(call find_python,3.13)
PYTEST = -m pytest --numprocesses 2 --dist worksteal
# With Python 3.12 and 3.13 come later versions of jax, flax and Orbax, the same for both. There the tests of the code
# that calls them are run, once: the mathematics, and what is the standard library's, with 3.13, or with 3.12 where it is
# the last; none that is slow, and none that needs torch
OF_LAST = $(addprefix tests/,flow data storage test_public_api.py)
ON_3.12 = $(addprefix tests/,networks parallel arrays models checkpoints training compile_report) \
	$(addprefix tests/pipeline/test_,pipeline.py pipeline_memory.py loras.py) $(if $(PYTHON3.13),,$(OF_LAST))
ON_3.13 = tests/convert $(OF_LAST)

.PHONY: demo test check docs clean

demo: .venv/demo.installed
	.venv/bin/arcflow demo

test: check $(if $(PYTHON3.12),.venv-3.12/test.installed) $(if $(PYTHON3.13),.venv-3.13/smoke.installed)
	.venv/bin/python $(PYTEST)
ifneq ($(PYTHON3.12),)
	.venv-3.12/bin/python $(PYTEST) -m "not slow and not long" $(ON_3.12)
endif
ifneq ($(PYTHON3.13),)
	.venv-3.13/bin/python $(PYTEST) -m "not slow and not long" $(ON_3.13)
endif

check: .venv/test.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/ty check

docs: .venv/test.installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'arcflow_jax needs Python 3.11 or newer'"
	$(PYTHON) -m venv .venv

.venv/demo.installed: .venv/bin/python setup.py
	.venv/bin/pip install --quiet --editable . $(addprefix --constraint ,$(PINS))
	touch $@

# With the PyTorch twins of the parity tests, which the library itself does not need
.venv/test.installed: .venv/bin/python setup.py $(PINS)
	.venv/bin/pip install --quiet --editable ".[test,parity,docs]" $(addprefix --constraint ,$(PINS))
	touch $@

.venv-3.12/test.installed: setup.py tests/constraints-3.12.txt
	$(PYTHON3.12) -m venv .venv-3.12
	.venv-3.12/bin/pip install --quiet --editable ".[test]" --constraint tests/constraints-3.12.txt
	touch $@

.venv-3.13/smoke.installed: setup.py tests/constraints-3.12.txt
	$(PYTHON3.13) -m venv .venv-3.13
	.venv-3.13/bin/pip install --quiet --editable ".[test]" --constraint tests/constraints-3.12.txt
	touch $@

clean:
	rm -rf .venv .venv-3.12 .venv-3.13 runs build site *.egg-info
