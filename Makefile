# Everything runs inside .venv, which the first command makes and later ones reuse.
# PYTHON       interpreter for .venv, 3.11 or newer        make PYTHON=python3.12 demo
# TORCH_INDEX  auto (default: a CPU build where no NVIDIA driver is), plain (the index pip is
#              set up for), or an index address            make TORCH_INDEX=plain test

PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done),python3)
TORCH_INDEX ?= auto
BIN := .venv/bin
READY := .venv/ready-$(shell cat pyproject.toml constraints.txt scripts/setup_env.py | cksum | cut -d' ' -f1)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -q

export TORCH_INDEX
export GRADIO_ANALYTICS_ENABLED := False

.PHONY: help setup demo demo-dit test test-full reliability defences lint format app docs
.PHONY: bench bench-gpu browser app-test

help:
	@echo "make demo       train SNELLA on photos of a cup and draw one picture, runs/demo/demo.png"
	@echo "make demo-dit   the same on a diffusion transformer, runs/demo-dit/demo.png"
	@echo "make test       the test suite          make test-full  also the slow tiers"
	@echo "make reliability  test-full, and write its figures to docs/reliability.md"
	@echo "make defences   take out each defence in a copy of the tree and see its tests fail"
	@echo "make bench      time, bytes and operations of all methods, to docs/performance.md"
	@echo "make bench-gpu  the same on an NVIDIA GPU"
	@echo "make app        the page, on http://127.0.0.1:7860"
	@echo "make app-test   its tests, also the slow ones, in a real browser that it installs"
	@echo "make lint       ruff and mypy           make format     rewrite the code with ruff"
	@echo "make docs       regenerate the generated pages and pictures under docs/"

$(READY):
	$(PYTHON) scripts/setup_env.py
	@rm -f .venv/ready-*
	@touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/python -m scripts.demo configs/dreambooth/demo.yaml

demo-dit: $(READY)
	$(BIN)/python -m scripts.demo configs/dreambooth/demo_dit.yaml

test: $(READY)
	$(PYTEST)

test-full: $(READY)
	$(PYTEST) -m "not gpu"

reliability: $(READY)
	$(PYTEST) -m "not gpu" --publish-rows

defences: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.check_defences --publish

bench: $(READY)
	$(BIN)/python -m benchmarks

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

app: $(READY)
	$(BIN)/python app.py

browser:
	$(PYTHON) scripts/setup_browser.py

app-test: $(READY) browser
	SNELL_REQUIRE_BROWSER=1 $(PYTEST) -m "not gpu" tests/app

docs: $(READY)
	$(BIN)/python scripts/draw_snella.py
	$(BIN)/python scripts/write_config_reference.py
