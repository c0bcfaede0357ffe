# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check bench clean install
install: $(STAMP)

# torch is installed first and pinned here only: the package itself accepts whatever torch a machine already has.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.c csrc/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev,plot,research]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m moe_runtime.launch.demo

test: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/moe-launch bench model
	$(BIN)/moe-launch bench load

clean:
	rm -rf $(VENV) build *.egg-info runs
