# Every target that needs .venv sets it up first; PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo

.PHONY: demo test test-fast test-oldest test-newest test-ray reliability fuzz audit soak docs-check lint types clean
.DELETE_ON_ERROR:

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Make an environment .venv/NAME on top of the packages of .venv: $(call environment,NAME,ARGUMENTS OF PIP INSTALL).
define environment
$(PYTHON) -m venv --without-pip .venv/$(1)
$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
    $$(.venv/$(1)/bin/python -c "import site; print(site.getsitepackages()[0])")/repository.pth
.venv/$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
touch .venv/$(1)/installed
endef

# With Gradio, for space/: Gradio needs an older pillow than the pinned one.
.venv/space/installed: .venv/installed requirements-space.txt
	$(call environment,space,-r requirements-space.txt)

# With the lower bounds of pyproject.toml: of the scripts, and of the model files alone.
.venv/oldest/installed .venv/oldest-model/installed: .venv/%/installed: .venv/installed requirements-%.txt
	$(call environment,$*,-r requirements-$*.txt)

# With Ray, for examples/label_with_ray.py.
.venv/ray/installed: .venv/installed requirements-ray.txt
	$(call environment,ray,-r requirements-ray.txt)

# On the digit images that scikit-learn carries: train, merge to three budgets without training, measure, save, report.
demo: export HF_HUB_OFFLINE = 1
demo: .venv/installed
	rm -rf $(DEMO)
	$(BIN)/python examples/digits_dataset.py --output_dir $(DEMO)/digits
	$(BIN)/python run_image.py examples/demo_finetune.yaml
	$(BIN)/python eval_sweep.py examples/demo_sweep.yaml

test: lint types .venv/space/installed
	.venv/space/bin/python -m pytest tests/space/test_app.py
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore tests/space/test_app.py

# Without the tests that compile, start other programs or train whole runs (listed in tests/conftest.py): under a minute
# on two cores.
test-fast: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

# Label tiny corpora with two workers on this machine.
test-ray: .venv/ray/installed
	.venv/ray/bin/python -m pytest tests/examples/test_label_with_ray.py

# Call one model from several threads, each with its own budget, for MINUTES; check answers and memory.
MINUTES ?= 60
soak: .venv/installed
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

# Test models in an environment, checkpoints that it exchanges with the pinned versions, and training by the scripts.
MODEL_TESTS = .venv/$(1)/bin/python -m pytest tests/model -m "not slow"
EXCHANGE_TESTS = OTHER_PYTHON=$(abspath .venv/$(1)/bin/python) $(BIN)/python -m pytest tests/model/test_remote_code.py
TRAINING_TESTS = .venv/$(1)/bin/python -m pytest tests/runs/test_run_glue.py tests/runs/test_run_image.py \
    -k finetunes_merges

test-oldest: .venv/oldest/installed .venv/oldest-model/installed
	$(call MODEL_TESTS,oldest-model)
	$(call EXCHANGE_TESTS,oldest-model)
	$(call MODEL_TESTS,oldest)
	$(call EXCHANGE_TESTS,oldest)
	$(call TRAINING_TESTS,oldest)

# The newest of everything but torch, so that an install never fetches another build.
test-newest: .venv/installed
	$(call environment,newest,--upgrade $$(sed -n 's/==.*//p' requirements.txt | grep -v '^torch$$'))
	$(call MODEL_TESTS,newest)
	$(call EXCHANGE_TESTS,newest)
	$(call TRAINING_TESTS,newest)

# Try every bad input, change between two runs and killed run; write the tables of docs/reliability.md.
reliability: .venv/installed
	$(BIN)/python -m tests.reliability

# Run the code blocks of the pages that are marked as runnable, check the others, and the links: tests/documents.
docs-check: .venv/installed
	$(BIN)/python -m tests.documents

# Try random configs, arguments, data files and images: `make fuzz SECONDS=60` for a minute.
SECONDS ?= 600
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzzing --seconds $(SECONDS)

# Look up the installed versions in the database of known vulnerabilities, with a tool in its own environment.
audit: .venv/installed
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	.venv/audit/bin/pip-audit --path $$($(BIN)/python -c "import site; print(site.getsitepackages()[0])")

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: .venv/installed
	$(BIN)/mypy

clean:
	rm -rf .venv outputs
