# `make demo` and `make test` each set up .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo

.PHONY: demo test test-fast reliability help-pages lint types clean
.DELETE_ON_ERROR:

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# The main job on real images that scikit-learn brings along: train, merge, measure, retrain, report.
demo: export HF_HUB_OFFLINE = 1
demo: .venv/installed
	rm -rf $(DEMO)
	$(BIN)/python examples/digits_dataset.py --output_dir $(DEMO)/digits
	$(BIN)/python run_image.py examples/demo_finetune.yaml
	$(BIN)/python eval_sweep.py examples/demo_sweep.yaml

test: lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What does not compile, start other programs or train whole runs (tests/conftest.py): under a minute on two cores.
test-fast: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

# Bad inputs, changes between two runs and kills, all of them; the tables go to docs/reliability.md.
reliability: .venv/installed
	$(BIN)/python -m tests.reliability

# What --help shows, kept so that it comes at once.
help-pages: .venv/installed
	$(BIN)/python -m experiments.help_page

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: .venv/installed
	$(BIN)/mypy

clean:
	rm -rf .venv outputs
