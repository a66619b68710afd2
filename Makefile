# Every target makes what it needs first: a virtual environment in .venv, the C parts, and the packages of the system that
# are missing (installed as root; otherwise the command to type is printed). Nothing is downloaded again while the files
# below .venv/.stamps are newer than what they were made from.

ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
NATIVE := $(wildcard src/native/*.c src/native/*.h src/scripts/*)
TESTS := $(wildcard tests/unit tests/integration tests/security tests/fault tests/interop tests/guest)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run test lint types layers format bench build clean

help:  ## say what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo
	@echo '  make run ARGS="run --memory 64m host -- sh"   passes other arguments to boxship'
	@echo '  make test PYTEST_ARGS="-k seccomp"            passes arguments to pytest'

run: build  ## start an isolated process from this machine's own files, and show what it sees
	@$(if $(ARGS),$(BIN)/boxship $(ARGS),tools/demo $(BIN)/boxship)

test: lint $(STAMPS)/test-packages  ## lint, then all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TESTS)

lint: $(STAMPS)/dev $(STAMPS)/native  ## ruff, mypy --strict, and the contract between layers
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/dev  ## let ruff repair what it can
	$(BIN)/ruff check --fix .

bench: build $(STAMPS)/dev  ## boxrun, runc and crun side by side
	$(BIN)/python -m bench $(ARGS)

build: $(STAMPS)/native  ## boxship and boxrun into .venv/bin
	@tools/system-packages run

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f src/boxship/linux/_sys.abi3.so src/boxship/runtime/_init src/boxship/engine/docker-init \
		src/boxship/network/proxy/_relay.abi3.so
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# `python -m venv --clear` would throw away what a half-made environment has; that is the wish here.
$(STAMPS)/venv:
	tools/system-packages build
	"$$(tools/python)" -m venv --clear $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/backend: | $(STAMPS)/venv
	$(PIP) install --quiet 'hatchling>=1.24' 'editables>=0.5'
	touch $@

# Without build isolation: pip would fetch the backend again for every change of a C file. What is installed already is kept.
$(STAMPS)/native: pyproject.toml hatch_build.py $(NATIVE) $(STAMPS)/backend
	tools/system-packages build
	$(PIP) install --quiet --no-build-isolation --editable .
	touch $@

$(STAMPS)/dev: pyproject.toml | $(STAMPS)/venv
	$(PIP) install --quiet 'pip>=25.1'  # the first that reads dependency groups
	$(PIP) install --quiet --group dev
	touch $@

$(STAMPS)/test-packages: $(wildcard tests/packages.txt) $(STAMPS)/dev $(STAMPS)/native
	tools/system-packages run test
	touch $@
