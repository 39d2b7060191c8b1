## make run               the main job: train, attack, defend, report (examples/mnist_svi.py)
## make paper             every table and figure of the paper; ARGS=--quick for all in minutes
## make test              the test suite
## make lint              format, lint and types, checked
## make format            format and lint, mended where that can be done for you
## make docs              the documentation, into docs/_build/html
## make bench             the sampler engine against the machine, Pyro and NumPyro (25 minutes)
## make test-slow         checks of minutes each, which a release waits for
## make test-gpu          the tests that need a CUDA GPU; .ci/gpu has these and more
## make test-lower-bounds the test suite with the oldest versions allowed
## make gpu-wheels        what .ci/gpu needs on a machine without a network, into wheels/
## make clean             remove what these made
## make help              this list
##
## Each sets up .venv on its own when it is missing or setup.cfg has changed. What may be said:
##
## ARGS="..."             passed on to what runs: pytest, Sphinx, the example, the benchmark
## PYTHON=python3.12      the Python that .venv is made with
## VENV=DIR               an environment elsewhere, instead of .venv
## DOCS_PYTHON=python3    for docs: an interpreter with everything installed, instead of .venv
## GPU_PYTHON=python3     the same for test-gpu
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
DOCS_PYTHON ?=
GPU_PYTHON ?=
GPU_TESTS := tests/cuda tests/test_training.py tests/test_training_any_vae.py

.PHONY: run paper test test-slow test-gpu test-lower-bounds gpu-wheels bench lint format docs clean help

help:
	@sed -n 's/^##[ ]\{0,1\}//p' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, so that a second call installs nothing.
$(VENV)/.stamp-run: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.stamp-%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[$*]'
	@touch $@

run: $(VENV)/.stamp-run
	$(BIN)/python examples/mnist_svi.py $(ARGS)

# As published it is days on a processor; ARGS="--quick", ARGS="--device cuda --data-root DIR".
paper: $(VENV)/.stamp-run
	$(BIN)/python -m pyro_vae_defence.experiments paper all $(ARGS)

# Two processes of one thread each; ARGS="-n 8" for more, ARGS="-n 0" for none beside pytest's own.
# Python and pytest keep what they compile, a third of what a run of all tests needs to begin.
test: export OMP_NUM_THREADS ?= 1
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -m "not slow and not cuda" -n 2 --dist worksteal $(ARGS)

# Slow checks: a few minutes each, the ones a release waits for.
test-slow: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -m "slow and not cuda" $(ARGS)

# On one CUDA GPU; without one they are skipped. PVD_TEST_DEVICE=cpu compares the CPU with itself.
test-gpu: $(if $(GPU_PYTHON),,$(VENV)/.stamp-test)
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m cuda $(GPU_TESTS) $(ARGS)

# What .ci/gpu lacks on a machine with PyTorch but no network, to travel there beside the code.
gpu-wheels: | $(BIN)/python
	$(BIN)/python -m pip download --disable-pip-version-check -q --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation py --abi none --platform any \
		-d wheels -r .ci/gpu-wheels.txt

# The oldest versions setup.cfg allows, in an environment of their own (downloads several GB).
test-lower-bounds:
	$(MAKE) test VENV=.venv-lower-bounds PIP_CONSTRAINT=tests/lower-bounds.txt \
		ARGS="-W ignore::DeprecationWarning -W ignore::FutureWarning $(ARGS)"

bench: $(VENV)/.stamp-bench
	$(BIN)/python -m pyro_vae_defence.experiments benchmark samplers $(ARGS)

lint: $(VENV)/.stamp-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.stamp-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(if $(DOCS_PYTHON),,$(VENV)/.stamp-docs)
	$(or $(DOCS_PYTHON),$(BIN)/python) -m sphinx -W --keep-going -b html $(ARGS) docs docs/_build/html

clean:
	rm -rf $(VENV) .venv-lower-bounds build *.egg-info docs/_build
