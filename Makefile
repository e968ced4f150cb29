# make demo    sets up .venv, draws a data set, trains, evaluates, and writes an annotated image
# make test    sets up .venv, runs the linter and the tests
# make figures sets up .venv, draws the pictures of the README into img/
# make notebook runs the README's Python blocks as docs/tutorial.ipynb, with their outputs
# make site    builds README, manual and modules as static pages in site/; after make demo with the
#              page of web/
# make web     exports the network of make demo, fetches the browser's runtime, and serves the page of
#              web/ at http://127.0.0.1:8000/
#
# PYTHON names the interpreter that .venv is made from: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

# glibc returns the memory of every large tensor to the system and requests it again, which costs a
# training step on a CPU 10 to 45 %. With these settings it keeps the memory.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: demo test figures notebook site web setup

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m tools.shapes --output-folder demo/shapes
	$(BIN)/python create_data_lists.py --train demo/shapes:trainval --test demo/shapes:test \
		--output-folder demo/data
	$(KEEP_MEMORY) $(BIN)/python train.py --data-folder demo/data --no-pretrained \
		--batch-norm --optimizer adamw --lr 4e-4 --batch-size 8 --iterations 140 --warmup 10 \
		--decay-lr-at 100 --print-freq 10 --eval-every 70 \
		--checkpoint demo/checkpoint.pth.tar
	$(BIN)/python eval.py --data-folder demo/data --checkpoint demo/checkpoint.pth.tar \
		--batch-size 8
	$(BIN)/python detect.py demo/shapes/JPEGImages/001001.jpg --output demo/annotated.png \
		--checkpoint demo/checkpoint.pth.tar

test: setup
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests

figures: setup
	$(BIN)/python -m tools.figures

notebook: setup
	$(BIN)/python -m tools.notebook

site: setup $(if $(wildcard demo/checkpoint.pth.tar),web/model.onnx)
	rm -rf site
	$(BIN)/python -m tools.site

web: setup web/model.onnx
	$(BIN)/python -m tools.web

web/model.onnx: demo/checkpoint.pth.tar | setup
	$(BIN)/python -m tools.export $< $@

demo/checkpoint.pth.tar:
	@echo '$@ is missing: run make demo first' >&2; exit 1
