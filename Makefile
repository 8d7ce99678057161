# Every target makes the virtual environment first if there is none. Windows: through WSL.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   := outputs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help install demo test export-check lint nbdev-test nbval unit soak lessons bench wheel lab docs docs-quarto refresh clean

help:
	@echo "make demo     train the tiny model on all of Fashion-MNIST (minutes on two cores), leave pictures"
	@echo "make test     everything that must hold: export, lint, notebooks, unit tests"
	@echo "make soak     kill a run 200 times, and look for a lost checkpoint (minutes)"
	@echo "make lessons  run every lesson in JupyterLab in a browser (minutes)"
	@echo "make bench    measure speed, memory and quality against diffusers and lucidrains (over an hour on two cores)"
	@echo "make lab      open the course in JupyterLab"
	@echo "make docs     build the site into _docs, without a network (Python 3.11 or newer)"
	@echo "make wheel    build the package and try it in a clean environment"
	@echo "make refresh  run the notebooks as a reader does and store their outputs"
	@echo "make clean    remove the virtual environment and what was built (outputs/ and data/ stay)"

$(VENV)/installed: settings.ini setup.py
	@echo "installing into $(VENV): some gigabytes, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/ddpm_train --config tiny --no-wandb --output_dir $(DEMO)
	$(BIN)/ddpm_sample --checkpoint $(DEMO)/checkpoints/best_model.pth --mode class_grid
	$(BIN)/ddpm_sample --checkpoint $(DEMO)/checkpoints/best_model.pth --mode progressive --num_samples 10
	@echo "Your clothes: $(DEMO)/samples/class_grid.png, and their way out of the noise: $(DEMO)/samples/progressive.png. How they come about: make lab"

test: export-check lint nbdev-test nbval unit

export-check: install
	$(BIN)/python tools/check_export.py
	$(BIN)/python tools/readme.py --check

lint: install
	$(BIN)/ruff check ddpm_tutorial tests tools nbs

# one thread each here as well: it runs as many notebooks at a time as there are cores
nbdev-test: install
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test

# each cell twice in a row (conftest.py); two notebooks at a time, each with one thread
nbval: install
	DDPM_TINY=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=300 --nbval-kernel-startup-timeout=120 nbs

# two at a time, each with one thread: most of these tests wait for processes, and threads that share two cores slow each other down
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile tests

soak: install
	OMP_NUM_THREADS=1 DDPM_KILLS=200 $(BIN)/pytest -q -rP tests/test_saves.py -k killed

lessons: install
	DDPM_EVERY_LESSON=1 $(BIN)/pytest -q tests/test_lab.py

bench: install
	$(BIN)/python tools/bench.py --compiled
	$(BIN)/python tools/bench_quality.py

wheel: install
	rm -rf dist
	$(BIN)/python -m build --quiet --wheel
	$(BIN)/python tools/try_wheel.py dist/*.whl

# the kernels run in nbs/, the data are where `make demo` has put them
lab: export DDPM_DATA_ROOT := $(or $(DDPM_DATA_ROOT),$(abspath data))
lab: install
	$(BIN)/jupyter lab nbs/00_idea.ipynb

docs: install
	$(BIN)/python tools/docs.py

# what is published: Quarto instead of smalldocs. README.md is ours (tools/readme.py): touched, it is not made again
docs-quarto: install
	$(BIN)/python -m pip install --quiet quarto-cli
	touch README.md
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_docs

refresh: install
	$(BIN)/python tools/refresh.py

clean:
	rm -rf $(VENV) build dist *.egg-info _proc _proc_site _docs .pytest_cache .ruff_cache
