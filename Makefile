# `make demo` and `make test` each set up .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo

.PHONY: demo test test-fast reliability lint types clean
.DELETE_ON_ERROR:

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Gradio, for space/, beside .venv and on top of its packages: it wants an older pillow than the one pinned.
.venv/space/installed: .venv/installed requirements-space.txt
	$(PYTHON) -m venv --without-pip .venv/space
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
	    $$(.venv/space/bin/python -c "import site; print(site.getsitepackages()[0])")/repository.pth
	.venv/space/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-space.txt
	touch $@

# On real images that scikit-learn brings along: train, merge to a few budgets without training, measure, save, report.
demo: export HF_HUB_OFFLINE = 1
demo: .venv/installed
	rm -rf $(DEMO)
	$(BIN)/python examples/digits_dataset.py --output_dir $(DEMO)/digits
	$(BIN)/python run_image.py examples/demo_finetune.yaml
	$(BIN)/python eval_sweep.py examples/demo_sweep.yaml

test: lint types .venv/space/installed
	.venv/space/bin/python -m pytest tests/space/test_app.py
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore tests/space/test_app.py

# What does not compile, start other programs or train whole runs (tests/conftest.py): under a minute on two cores.
test-fast: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

# Bad inputs, changes between two runs and kills, all of them; the tables go to docs/reliability.md.
reliability: .venv/installed
	$(BIN)/python -m tests.reliability

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: .venv/installed
	$(BIN)/mypy

clean:
	rm -rf .venv outputs
