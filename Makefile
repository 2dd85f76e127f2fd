# Each target works alone in a fresh clone: it makes .venv and installs what it needs, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
# -qq leaves errors. Without the constraint a torch with gigabytes of GPU libraries can be chosen.
INSTALL := $(PY) -m pip install -qq -c constraints.txt
# With several workers, one thread each: more only makes them wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test long zoo bench lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train, prune and shrink a small network (installs the package first)"
	@echo "make test    the test suite"
	@echo "make long    the long tests: many generated networks, large models"
	@echo "make zoo     a sweep over real models, beside torch-pruning; writes docs/zoo.md"
	@echo "make bench   the benchmarks"
	@echo "make lint    ruff, mypy, pyright"
	@echo "make clean   remove the virtual environment, caches and build output"

demo: $(VENV)/.demo
	$(PY) examples/quickstart.py

test: $(VENV)/.test
	$(PYTEST) -m "not long"

long: $(VENV)/.test
	HYPOTHESIS_PROFILE=long $(PYTEST) -m long

zoo: $(VENV)/.test
	$(PY) -m zoo --peer --workers $(WORKERS)

bench: $(VENV)/.test
	$(PY) -m benchmarks

lint: $(VENV)/.lint
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m pyright

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a file per set of installed packages, renewed when what it was made from changes.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e . scikit-learn
	touch $@

# torchvision goes first and alone, so that it has no say in which torch is chosen; timm finds it present.
$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --no-deps torchvision
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) -e ".[lint]"
	touch $@
