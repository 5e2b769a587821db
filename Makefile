# make demo: train the bundled model on the bundled text. make test: checks and tests. Both set up .venv first.
# make faults, networks, elastic: the long tests of what a run survives, of check_cluster.py, and of train_elastic.py.
# make browser: looks at the report and the dashboard with Chromium. make images: writes the images of README.md.
# make soak MINUTES=60 SEED=1: random faults for 60 minutes. make forecast: compares check_cluster.py with train.py.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
ALONE := tests/check tests/cluster tests/faults
# Many tests wait for processes that wait for each other: one worker more than cores.
WORKERS = $$($(BIN)/python -c 'import os; print(min(4, os.cpu_count() + 1))')
QUICK := not faults and not networks and not elastic and not browser
SOURCES := forge_lib scripts tests data docs
# Python compiles each module at its first import; compiling everything at installation takes a minute longer.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo smoke docs notebook style quality test faults networks elastic browser images soak forecast clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[report,dashboard]'
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml scripts/train.py \
		--model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt --sample-by paragraph --eval-fraction 0.05 \
		--sequence-length 128 --batch-size 8 --max-steps 1200 --learning-rate 4e-3 --warmup-steps 50 \
		--log-every 100 --eval-every 200 --sample-every 400 --report-to trackio --output-dir $(DEMO)
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml scripts/evaluate.py \
		--model-name $(DEMO)/final --dataset-path data/sample_corpus.txt --sample-by paragraph --eval-fraction 0.05 \
		--sequence-length 128
	@for seed in 1 2 3; do \
		echo; echo "Sample $$seed:"; \
		$(BIN)/python scripts/generate.py --model-name $(DEMO)/final --seed $$seed --temperature 0.6 \
			--max-new-tokens 120 || exit 1; \
	done
	@echo
	@echo "The model is in $(DEMO)/final, its checkpoints in $(DEMO)/checkpoints, its metrics in $(DEMO)/metrics.jsonl."
	@echo "All plots: $(DEMO)/report.html. The dashboard: . .venv/bin/activate; trackio show --project p2p-llm-forge"

smoke: setup
	$(BIN)/python tests/smoke_single_node.py

docs: .venv/ready-dev
	$(BIN)/python docs/make_flags.py

notebook: .venv/ready-dev
	$(BIN)/python docs/make_notebook.py

style: .venv/ready-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

quality: .venv/ready-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

test: quality
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup -m 'not alone and $(QUICK)'
	$(BIN)/python -m pytest -m 'alone and $(QUICK)' $(ALONE)

faults: .venv/ready-dev
	$(BIN)/python -m pytest -m faults

networks: .venv/ready-dev
	$(BIN)/python -m pytest -m networks

elastic: .venv/ready-dev
	$(BIN)/python -m pytest -m elastic

browser: .venv/ready-dev
	$(BIN)/python -m pytest -m browser tests/browser

images: .venv/ready-dev
	$(BIN)/python docs/make_images.py

soak: .venv/ready-dev
	$(BIN)/python tests/faults/soak.py --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

forecast: .venv/ready-dev
	$(BIN)/python tests/check/forecast.py

clean:
	rm -rf .venv runs artifacts *.egg-info .pytest_cache .ruff_cache
