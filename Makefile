# Two commands: `make demo` and `make test`. Both set up .venv first, once: again only when the pins change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test clean

demo: $(READY)
	$(BIN)/dblend demo --out out/demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

clean:
	rm -rf .venv out build

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"python >= 3.11 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[scale,test]'
	@touch $@
