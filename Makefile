# `make train` and `make test` do all their own set-up; a second run reuses it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# PyTorch is installed first and never replaced; e.g. `make test TORCH=torch==2.6.0`
# before the first run, or after `make clean`.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint .venv/torch.txt
OUTSIDE := build/outside
# The wheel as a user has it: an environment of its own, the dependencies shared with .venv.
INSTALLED := $(CURDIR)/build/installed/bin/python

SOURCES := bilevel experiments problems solvers $(shell find bilevel experiments problems solvers -type d -o -name '*.py')

.PHONY: help train test lint format types wheel wheel-test docs site-test tutorials ci clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

train: .venv/.train  ## Set up everything and train iMAML
	$(BIN)/bilevel train imaml

test: .venv/.test  ## Set up everything and run the tests
	$(BIN)/pytest $(PYTEST_ARGS)

lint: .venv/.dev  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot see an editable install whose folders are renamed, so give it the package as it
# installs, made of links, and report the paths as they are in the repository.
types: .venv/.dev  ## Check types
	rm -rf build/types && mkdir -p build/types/bilevel
	ln -s $(CURDIR)/bilevel/* $(CURDIR)/experiments $(CURDIR)/problems $(CURDIR)/solvers \
	    build/types/bilevel/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache --package bilevel \
	    | sed -E 's,^bilevel/(experiments|problems|solvers)/,\1/,'

wheel: dist/.checked  ## Build the source distribution, and the wheel from it

dist/.checked: $(SOURCES) pyproject.toml README.md .ci/check_wheel.py | .venv/.dev
	rm -rf dist && mkdir -p build
	$(BIN)/python -m build --outdir dist . > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	$(BIN)/python .ci/check_wheel.py dist/*.whl
	touch $@

build/installed/.ready: dist/.checked
	rm -rf build/installed && $(BIN)/python -m venv --without-pip build/installed
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > "$$($(INSTALLED) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(BIN)/python -m pip --quiet --python build/installed install \
	    --no-deps --force-reinstall dist/*.whl
	rm -rf $(OUTSIDE) && mkdir -p $(OUTSIDE)
	cd $(OUTSIDE) && $(INSTALLED) -c "import sys, bilevel.problems as p, bilevel.solvers as s; \
	    assert all(m.__file__.startswith(sys.prefix) for m in (p, s)), (p, s)"
	touch $@

# All tests were run on the same files; here it is asked whether the wheel holds them all, which
# tests/ground finds out by importing every module, and tests/cli by using what is registered.
wheel-test: build/installed/.ready  ## Use the wheel from outside the root
	cd $(OUTSIDE) && $(INSTALLED) -m pytest -c $(CURDIR)/pyproject.toml -o cache_dir=cache \
	    $(PYTEST_ARGS) --ignore $(CURDIR)/tests/ground/test_examples.py \
	    $(CURDIR)/tests/ground $(CURDIR)/tests/cli

docs: build/installed/.ready  ## Build the site, strictly, from the installed wheel
	cd $(OUTSIDE) && NO_MKDOCS_2_WARNING=1 $(INSTALLED) -m mkdocs build --strict --quiet \
	    --config-file $(CURDIR)/mkdocs.yml --site-dir $(CURDIR)/site
	$(BIN)/python .ci/check_site.py site

# The rules of accessibility that `site-test` asks. Node reads its certificates by a name of its own.
AXE := build/axe/node_modules/axe-core/axe.min.js
$(AXE):
	NODE_EXTRA_CA_CERTS="$${NODE_EXTRA_CA_CERTS-$${SSL_CERT_FILE-}}" \
	    npm install --loglevel error --no-audit --no-fund --prefix build/axe axe-core@4.14.1

site-test: docs $(AXE)  ## Look at every page of the site; needs Chromium and npm
	BILEVEL_SITE=$(CURDIR)/site BILEVEL_AXE=$(CURDIR)/$(AXE) $(BIN)/pytest $(PYTEST_ARGS) tests/browser

tutorials: .venv/.dev  ## Run the scripts of the documentation and record what they print and draw
	$(BIN)/python docs/hooks/record.py

ci:  ## Everything that must hold before a change lands
	.ci/run

clean:  ## Remove everything that was built or installed
	rm -rf .venv build dist site *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip freeze | grep '^torch==' > .venv/torch.txt
	touch $@

.venv/.train: pyproject.toml .venv/.torch
	$(INSTALL) --editable '.[cli,data]'
	touch $@

.venv/.test: pyproject.toml .venv/.torch
	$(INSTALL) --editable '.[cli,data,test]'
	touch $@

.venv/.dev: pyproject.toml .venv/.torch
	$(INSTALL) --editable '.[dev]'
	touch $@
