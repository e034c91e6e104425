# The two commands: `make run` compares GAM, a Transformer and Mamba on real text; `make test` runs every check.
# Each sets up .venv by itself and is quick when run again. PYTHON and OUT may be set. `make docs` builds the site and serves it.

PYTHON ?= python3
OUT ?= runs/laptop
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test test-fast test-browser soak fuzz lint docs docs-build wheel-test bench-gpu bench-gpu-train carried clean

run: .venv/installed-plot,numba
	$(BIN)/gam bench --preset laptop --out $(OUT)
	@echo; echo "A sample of what the trained GAM writes:"; echo
	$(BIN)/gam generate $(OUT)/runs/gam-seed0 --prompt "The function returns" --max-new-tokens 80 --seed 0
	@echo; echo "Run, table and plot are in $(OUT)."

# Not among the two: want an H100-class GPU, the first 8 minutes, the second 16 cores, and go on where they stopped. OFFLINE=1, on a machine without a network, takes its own Python
# with the source tree and the folder carried/ that `make carried` wrote elsewhere (docs/speed.md).
GAM := $(if $(OFFLINE),env PYTHONPATH=src:carried/packages $(PYTHON) -m gam_lm,$(BIN)/gam)
SETUP := $(if $(OFFLINE),,.venv/installed-plot)
bench-gpu: $(SETUP)
	$(GAM) bench-gpu --out results/gpu

bench-gpu-train: $(SETUP) $(if $(OFFLINE),,carried/ids/carried.json)
	$(GAM) tune --preset gpu --data carried/ids --steps 610 --validate-every 610 --search muon_learning_rate=0.012:0.08 --trials 3 --widenings 0 --workers $(WORKERS) --out results/gpu/tune
	$(GAM) bench --preset gpu --data carried/ids --seeds 0 1 --tuned results/gpu/tune --test --no-timing --workers $(WORKERS) --primary gam:gam-attention --primary gam:llama --primary gam:mamba --margin 0.02 --out results/gpu/train

# What those read without a network: 20 million tokens of public-domain novels (40 MB), and the packages that a machine with torch, triton and transformers lacks.
THERE ?= 3.12
WORKERS ?= 15
carried: carried/ids/carried.json carried/packages/tyro
carried/ids/carried.json: | .venv/installed-plot
	$(BIN)/gam data prepare books --vocab-size 4096 --carry carried/ids --carry-tokens 20100000
carried/packages/tyro: | .venv/installed-plot
	$(INSTALL) --target carried/packages --only-binary :all: --python-version $(THERE) --platform manylinux2014_x86_64 pydantic tyro optuna
	rm -rf carried/packages/numpy*  # torch brought its own

test: .venv/installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -rs

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

# The pages in Debian's Chromium: apt-get install chromium chromium-driver. `make test` runs these too, where there is one.
test-browser: .venv/installed-dev
	$(BIN)/python -m pytest -m browser -rs

# Hundreds of kills, for an evening: every file operation, and random moments, also of bench, tune and recall; then 20,000 steps.
soak: .venv/installed-dev
	$(BIN)/python tests/soak/kills.py --operations --random 500 --out results/reliability
	$(BIN)/python tests/soak/commands.py --runs 50 --out results/reliability
	$(BIN)/python tests/soak/steps.py --out results/reliability

# As many damaged inputs as one likes, of every kind; the counts go to results/reliability.
N ?= 2000
fuzz: .venv/installed-dev
	$(BIN)/python tests/fuzz/driver.py --inputs $(N) --out results/reliability

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The site with its search; DOCS_PORT may be set. Ctrl-C ends it.
DOCS_PORT ?= 8001
docs: docs-build
	@echo "The site: http://127.0.0.1:$(DOCS_PORT)/"
	@$(BIN)/python -m http.server --directory site --bind 127.0.0.1 $(DOCS_PORT) 2> /dev/null || { echo "port $(DOCS_PORT) is taken: make docs DOCS_PORT=8002"; exit 2; }

docs-build: .venv/installed-dev
	$(BIN)/zensical build --strict --clean --config-file mkdocs.yml
	@for picture in $$(grep -oh 'results/[^)" ]*\.svg' docs/*.md | sort -u); do mkdir -p site/$$(dirname $$picture) && cp $$picture site/$$picture; done
	@echo "The site is in site/; its search needs a server: make docs."

# The wheel alone in a new environment: nothing is compiled, no extra comes along, and it trains.
wheel-test: .venv/installed-plot
	rm -rf build && $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build .
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --constraint constraints.txt torch
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --constraint constraints.txt build/gam_lm-*.whl
	@! build/clean/bin/python -m pip list | grep -iE "^(transformers|datasets|matplotlib|onnx|starlette|lm_eval|tensorboard) " || { echo "an extra came with the core"; exit 1; }
	cd build && clean/bin/gam train --data stdlib --vocab-size 512 --hidden-size 32 --num-hidden-layers 1 --gam.num-memory-slots 32 --steps 3 --batch-size 2 --context 32 --out run
	cd build && clean/bin/gam generate run --prompt "The" --max-new-tokens 8 && clean/bin/gam env

clean:
	rm -rf .venv site build

# torch alone first: with the pinned build in place nothing else pulls another one.
.venv/installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"gam-lm needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable ".[$*]"
	@touch $@
