# Two commands: `make run` sets everything up and runs the miniature, `make test` the tests.
PYTHON ?= python3
RECIPE ?= miniature
# Of `make ablation`: painted, or web (unlabelled pictures standing in).
PICTURES ?= painted
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# One thread per test process: sums over threads depend on how many there are.
TEST := OMP_NUM_THREADS=1 PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 $(PY) -m pytest
NOT_HERE := not slow and not gpu and not postgres and not faults and not ray

.PHONY: run ablation setup test test-faults test-ray test-slow lint deploy golden clean

run: $(READY)
	$(PY) flows/clouds.py --recipe $(RECIPE)

ablation: $(READY)
	$(PY) flows/clouds.py study ablation --with pictures=$(PICTURES)

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	@echo "setting up $(VENV) (some minutes, several GB: torch is among it)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)
	@echo "set up: use .venv/bin/clouds, or activate .venv"

test: $(READY)
	$(TEST) -m "$(NOT_HERE)" -n 2 --dist loadfile --timeout 600 tests

test-faults: $(READY)
	$(TEST) -m faults --timeout 3600 tests

test-ray: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check "ray>=2.50"
	$(TEST) -m ray --timeout 1200 tests

test-slow: $(READY)
	$(TEST) -m "slow and not gpu" --timeout 3600 tests

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

deploy: $(READY)
	$(PY) -m flows.deploy

golden: $(READY)
	$(PY) -m tests.golden ../shared/golden

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
