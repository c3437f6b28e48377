# What people do here. Every target sets itself up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
export PYTHONWARNINGS ?= ignore::DeprecationWarning:alpaca,ignore::DeprecationWarning:websockets

.PHONY: help install demo test verify mutation lint types coverage fmt notebook export docs docs-serve bench simulate parity constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## create .venv and install trader_lib with everything it needs

$(INSTALLED): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trader_lib needs Python 3.11 or newer; run make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 3; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 3; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	$(BIN)/python -m tests.tools.warm
	@touch $@

demo: install ## the main job: backtest, simulated paper session, comparison
	@$(BIN)/trader demo

# Many tests wait for a socket, a kernel or a clock, so that two at once on each core take less time than one.
JOBS ?= $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2))))
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
# Some tests run servers and kernels in real time. What fails beside others runs once more, alone: a race on a busy machine
# is shown and does not stop the rest; what fails twice is broken.
ALONE := echo "What failed runs once more, alone." && $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none

test: install lint types coverage ## what must hold before a change lands: lint, types, notebooks and tests, coverage

verify: $(DOCS_INSTALLED) ## what takes longer: kill loops, simulated seeds, planted bugs, changed rules, attacks on servers, the package, the site
	$(PYTEST) -m 'slow or packaging' tests || { $(ALONE) -m 'slow or packaging' tests; }
	$(BIN)/python -m tests.mutation --sample $(MUTANTS) --seed $(MUTANT_SEED)

# So many small changes to rules as some three minutes on two cores allow, the same until a rule changes; MUTANT_SEED draws others.
MUTANTS ?= 200
MUTANT_SEED ?= 2026

mutation: install ## change every rule a little, a change at a time, and report what no test notices (MODULE=rules.account)
	$(BIN)/python -m tests.mutation $(if $(MODULE),--module $(MODULE))

lint: install ## ruff over notebooks, tests and tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## mypy --strict over the exported library
	$(BIN)/mypy

coverage: install ## notebooks and tests under one coverage figure, compiled functions run as Python
	rm -f .coverage .coverage.*
	export COVERAGE_FILE=.coverage.compiled; $(PYTEST) --cov --cov-report= -m '$(QUICK)' tests nbs || \
		{ $(ALONE) --cov --cov-append --cov-report= -m '$(QUICK)' tests nbs; }
	COVERAGE_FILE=.coverage.plain NUMBA_DISABLE_JIT=1 $(PYTEST) --cov --cov-report= -m '$(QUICK)' $(PLAIN)
	$(BIN)/coverage combine -q .coverage.compiled .coverage.plain
	$(BIN)/coverage report --fail-under=90
	$(BIN)/coverage report --include='trader_lib/risk/*,trader_lib/rules/*,trader_lib/agents/execution.py' --omit='trader_lib/rules/numbers.py' --skip-empty --fail-under=100

QUICK := not slow and not packaging

# Where compiled functions live, and what tests them; the second run counts their lines.
PLAIN := nbs/rules nbs/trading nbs/exchange nbs/risk nbs/strategy $(wildcard nbs/research/0*.ipynb nbs/research/1*.ipynb nbs/research/2[01]*.ipynb) \
	tests/test_rules_boundaries.py tests/test_trading_folding.py tests/test_strategy_sizing.py tests/test_strategy_planner.py \
	tests/test_research_engine.py tests/test_rules_actions.py tests/test_rules_carry.py

fmt: install ## format notebooks and tests, clean notebooks, export the library
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format -q .
	$(MAKE) export

export: install ## clean the notebooks and export the library and the run templates from them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname trader_lib/course
	$(BIN)/nbdev_export
	$(BIN)/python -m tests.tools.sync_templates

notebook: install ## open the notebooks in JupyterLab
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt jupyterlab
	$(BIN)/jupyter lab nbs

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev,docs]'
	@touch $@

docs: $(DOCS_INSTALLED) ## build the site into _docs, lessons with outputs; EXECUTE=1 runs the chapters as well
	$(BIN)/python docs/site/pages.py build/site/pages $(if $(filter 1,$(EXECUTE)),--execute)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site -d build/site/doctrees build/site/pages build/site/html
	@rm -rf _docs && cp -r build/site/html _docs
	@echo "The site is in _docs; make docs-serve shows it."

docs-serve: docs ## build the site and show it on http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(or $(PORT),8000)

# NautilusTrader, to measure beside; in an environment of its own (some 700 MB), made once.
NAUTILUS := build/bench/nautilus
$(NAUTILUS)/.installed:
	$(PYTHON) -m venv $(NAUTILUS)
	$(NAUTILUS)/bin/python -m pip install --quiet --disable-pip-version-check nautilus_trader==1.221.0
	@touch $@

bench: install $(NAUTILUS)/.installed ## measured figures: import time, engines, sessions beside NautilusTrader (BARS=20000), order path
	BENCH_BARS=$(or $(BARS),20000) $(BIN)/python -m tests.bench $(PARTS)

simulate: install ## play SEEDS sessions behind a bad connection (300), and report what broke
	@$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),300)

parity: install ## play SEEDS drawn configurations in both engines (500), and report where they disagree
	@$(BIN)/python -m tests.parity --seeds $(or $(SEEDS),500)

constraints: ## resolve everything anew and pin it
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev,docs]'
	{ echo "# The full resolved set, so that two machines install the same. Renew with: make constraints"; \
		$(BIN)/python -m pip freeze --exclude-editable; } > constraints.txt
	touch $(INSTALLED) $(DOCS_INSTALLED)

clean: ## remove what the targets made, runs excepted
	rm -rf $(VENV) build dist _docs .jupyter_cache *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
