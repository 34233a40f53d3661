PYTHON ?= python3
BIN := .venv/bin
CORE := .venv/.core
DEV := .venv/.dev
.PHONY: demo test test-pipelines test-matrix lint clean

demo: $(CORE)  ## quantize the bundled text-to-image model, then sample from it with plain diffusers
	$(BIN)/accuquant calibrate recipes/emoji_w8a8.yaml --overwrite
	$(BIN)/python tools/demo.py out/emoji_w8a8

test: lint  ## everything that has to hold
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not pipelines"

test-pipelines: $(DEV)  ## every pipeline class of the matrix, not only the four that `make test` takes
	ACCUQUANT_PIPELINES=build/pipelines $(BIN)/python -m pytest -n 2 tests/pipeline/test_zoo.py \
	    tests/pipeline/test_end_to_end.py --deselect tests/pipeline/test_end_to_end.py::test_every_row_of_the_page_is_of_the_zoo
	$(BIN)/python -m tools.pipelines_page build/pipelines

test-matrix: $(DEV)  ## the numerics as other CPUs compute them, half an hour at most; MATRIX=--quick for a part of it
	$(BIN)/python -m tools.test_matrix $(MATRIX)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv: $(DEV)

$(CORE): pyproject.toml constraints.txt  # what the package itself needs, and no more
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[text]"
	@touch $@

$(DEV): $(CORE)  # linter, type checker, tests, and what trains the bundled model
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,train]'
	@touch $@

clean:
	rm -rf .venv build dist out .mypy_cache .ruff_cache .pytest_cache
