# `make demo` and `make test` do everything on a fresh machine with Python 3.10+ and a package index.
PYTHON ?= python3
VENV := .venv
# Two test processes on two cores: with two threads each they wait for each other (a call of 2 ms takes 300).
export OMP_NUM_THREADS ?= 1
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# `make test-torch` tries another PyTorch: `VERSION=2.14.1`, or the newest on the index.
SHORT := -m "not slow" tests/export/torch_compat tests/verify/test_torch_compat.py tests/verify/test_onnxruntime_errors.py \
	tests/export/test_models.py tests/export/tracing/test_trace.py tests/export/tracing/test_idioms.py \
	tests/export/onnx/test_untranslated.py \
	tests/export/onnx/test_size_numbers.py tests/export/experts/test_not_hit.py tests/export/experts/test_mixing.py \
	tests/export/recurrence/test_loops_that_count.py tests/export/recurrence/test_user_scans.py
OTHER := build/torch-$(or $(VERSION),newest)

.PHONY: demo test test-slow test-slow-share test-torch test-matrix real gpu carried bench compare lint types docs install clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -qq -c constraints.txt torch
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,docs,pictures,rtx]' --config-settings editable_mode=strict
	# It asks for onnxruntime, whose import name onnxruntime-gpu has; it is not there for every system.
	-$(BIN)/python -m pip install -qq --no-deps -c constraints.txt onnxruntime-genai
	touch $@

# A strict editable install links the files that exist; run this again after adding or removing one.
install: $(STAMP)
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e . --config-settings editable_mode=strict

demo: install
	$(BIN)/moe-export models/sparse_moe.py --opset 17 -o out

# A file's tests share what they export, so a file stays with one process.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=40 -m "not slow" --ignore=tests/bench

# At most 25 minutes of the slow tests (or MINUTES), others each day.
test-slow-share: install
	$(BIN)/python tests/slow_share.py $(addprefix --minutes ,$(MINUTES))

test-slow: install
	$(BIN)/python -m pytest -m slow

# The canaries and a short list of exports under another PyTorch, in an environment of its own (with CUDA, 6 GB).
test-torch:
	$(PYTHON) -m venv --clear $(OTHER)
	grep -v '^torch==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install -qq --upgrade pip "setuptools>=77" wheel
	$(OTHER)/bin/python -m pip install -qq -c $(OTHER)/constraints.txt 'torch$(addprefix ==,$(VERSION))' -e '.[dev]' \
		--config-settings editable_mode=strict
	$(OTHER)/bin/python -m pytest $(SHORT)

# The wheel under each Python of this machine, with the pinned PyTorch and the newest; `ONLY="3.12 pinned"` for one of them.
test-matrix: install
	$(BIN)/python tests/matrix.py $(if $(ONLY),--only $(ONLY)) -- $(SHORT)

# Modules of packages from PyPI, each exported as it is; `make real ONLY=mamba` for those whose name holds that.
real: install
	$(BIN)/python tests/families/real.py $(addprefix --only ,$(ONLY))

bench: install
	$(BIN)/python -m pytest tests/bench -s

# Everything that needs a GPU, in under ten minutes: docs/gpu.md. `make gpu GPU="--cpu --small"` rehearses it without one;
# `make gpu WHEELS=folder` installs from a folder of wheels, without an index.
ifdef WHEELS
gpu: carried
else
gpu: install
endif
	$(BIN)/python tests/gpu/run.py $(GPU)

carried:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-index --find-links $(WHEELS) "setuptools>=77" wheel
	$(BIN)/python -m pip install -qq --no-index --find-links $(WHEELS) --no-build-isolation -e '.[dev,rtx]' \
		--config-settings editable_mode=strict
	touch $(STAMP)

# Beside torch.onnx.export: writes the table of docs/exporters.md; `make compare ONLY="mamba gate"` only prints some rows.
compare: install
	$(BIN)/python tests/bench/exporters.py $(if $(ONLY),--only $(ONLY),--page)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy -p moe_export

# Offline; a warning is an error.
docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site
	@echo "open build/site/index.html"

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
