# Two commands matter on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench table clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## protect a real portrait with the embedded default, into out/
	@mkdir -p out
	@$(RUN)/python -c 'from skimage import data, io; io.imsave("out/astronaut.png", data.astronaut(), check_contrast=False)'
	$(RUN)/shields protect out/astronaut.png --out out/astronaut-protected.png --sheet out/astronaut-sheet.png --report out/astronaut-report.json --overwrite
	$(RUN)/shields verify out/astronaut.png out/astronaut-protected.png --report out/astronaut-report.json
	@echo "Look at out/astronaut-sheet.png: before, after, and the perturbation amplified."

test: $(VENV)/.installed  ## all tests (needs neither ../shared nor a GPU)
	$(RUN)/python -m pytest -q

lint: $(VENV)/.installed  ## style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(VENV)/.installed  ## speed against a plainly written reference, side by side in one run
	@mkdir -p out
	$(RUN)/python -m pytest tests/bench -q -s --benchmark-only --benchmark-json=out/bench.json

table: $(VENV)/.installed  ## what the default does, on the CelebA-HQ samples (needs ../shared)
	$(RUN)/python -m robustness.default_report --plan embedded:4 --plan embedded:8 --plan embedded:16 --plan published:8 --stealth --readme README.md

clean:  ## remove what the targets above made
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .benchmarks
