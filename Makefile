# `make demo` and `make test` need nothing but Python 3.10 or newer: the first call makes .venv and installs.
PYTHON ?= python3
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)

demo: .venv/installed
	mkdir -p $(DEMO)
	.venv/bin/python simsiam.py --views-png $(DEMO)/views.png
	.venv/bin/python simsiam.py --out $(DEMO)
	.venv/bin/python knn.py --checkpoint $(DEMO) --neighbours $(DEMO)/neighbours.png

test: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/linting
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/linting: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check 'ruff>=0.6'
	touch $@

.PHONY: demo test lint
