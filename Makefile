# Two commands do everything on a machine with Python 3.11, pip and make: `make demo` and `make test`.
# They share one virtual environment; constraints.txt pins torch for them alone.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SAMPLE := sample_models/moving_digits

# Two cores that somebody else may be using: waiting threads should not spin.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test fast full oldest lint docs clean

demo: $(VENV)/.installed
	$(VENV)/bin/htcompress convert $(SAMPLE)/model.pt --budget 5000 --task $(SAMPLE)/task.py -o moving_digits-ht

test: $(VENV)/.development
	$(VENV)/bin/python -m pytest -n 2

# What takes no longer than a minute; and what `make test` leaves of full cross products.
fast: $(VENV)/.development
	$(VENV)/bin/python -m pytest -n 2 -m "not slow" tests/tensor tests/matrix tests/nn tests/storage tests/report tests/checks tests/test_house.py tests/test_numbers.py tests/test_task.py

full: $(VENV)/.development
	$(VENV)/bin/python -m pytest -n 2 --full -m "full or drawn"

# The oldest versions that pyproject.toml promises, in an environment of their own.
oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest -n 2

$(VENV)-oldest/.installed: pyproject.toml oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c oldest.txt -e ".[test]"
	touch $@

lint: $(VENV)/.development
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.development
	$(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VENV)-oldest site build *.egg-info moving_digits-ht

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[test,lint,docs]"
	touch $@ $(VENV)/.installed
