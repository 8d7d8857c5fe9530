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

# The tests of what is optional, with the packages that it wants: -rs says what is skipped even so.
check: .venv/extras
	.venv/bin/python -m pytest -rs tests/test_plot.py tests/test_export.py tests/test_knn.py tests/test_pages.py \
	    tests/test_tensorboard.py tests/test_docs.py tests/test_peers.py

# The code in docs/papers.md anew from the four files; and that page in two columns, site/index.html.
docs: .venv/installed
	.venv/bin/python docs/build.py

site: .venv/extras docs
	.venv/bin/python docs/page.py

# The pictures of README.md and docs/, three runs on the drawn set of a minute or more on a CPU; two from results/.
IMAGES := docs/images
DRAWN := runs/pictures-$(shell date +%Y%m%d-%H%M%S)
pictures: .venv/extras
	.venv/bin/python simclr.py --batch-size 4 --views-png $(IMAGES)/views.png
	.venv/bin/python simclr.py --out $(DRAWN)/simclr
	.venv/bin/python knn.py --checkpoint $(DRAWN)/simclr --neighbours $(IMAGES)/neighbours.png \
	    --map $(DRAWN)/map.png
	.venv/bin/python -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).reduce(2).quantize(96).save(sys.argv[2], \
	    optimize=True)' $(DRAWN)/map.png $(IMAGES)/map.png  # a tenth of its bytes
	.venv/bin/python bench/report.py --peers-png $(IMAGES)/peers.png
	.venv/bin/python bench/report.py --labels-png $(IMAGES)/labels.png
	.venv/bin/python simsiam.py --amp off --out $(DRAWN)/simsiam
	.venv/bin/python simsiam.py --no-stop-gradient --amp off --out $(DRAWN)/collapsed
	.venv/bin/python plot.py $(DRAWN)/simsiam $(DRAWN)/collapsed --only loss std knn rank \
	    --labels "SimSiam" "without stop-gradient" --out $(IMAGES)/collapse.png

lint: .venv/linting
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/extras: .venv/installed pyproject.toml
	.venv/bin/python -m pip install --quiet --disable-pip-version-check '.[plot,tensorboard,peers,docs]'
	touch $@

.venv/linting: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check 'ruff>=0.6'
	touch $@

.PHONY: demo test check docs site pictures lint
