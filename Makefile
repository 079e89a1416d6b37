# `make help` lists the targets. Everything is installed into .venv, and nothing is done twice.
#
#   PYTHON      the Python to build .venv with, 3.10 or newer: make demo PYTHON=python3.12
#   PIP_FLAGS   more arguments for pip, for example the index of another build of torch

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# A step may use every core, so steps follow one another under `make -j` too.
.NOTPARALLEL:
# Another environment that happens to be active does not count.
unexport VIRTUAL_ENV PYTHONHOME

.PHONY: help demo test lint types docs unit mpi bench torture fuzz data install clean slurm-cluster slurm-cluster-stop

## demo     fine-tune MiniLM in a federation of eight clients: a server and four workers over MPI
demo: data
	@echo "== mpirun --with-ft ulfm -n 5 mpifedlora run examples/newsgroups.toml --out runs/demo --overwrite"
	@. tests/mpi_env.sh && mpirun --with-ft ulfm -n 5 mpifedlora run examples/newsgroups.toml --out runs/demo --overwrite

## test     everything below, one after another
test: lint types docs unit mpi
	@echo "== all checks passed"

## lint     format and lint
lint: .venv/.installed
	@echo "== ruff: format"
	@$(BIN)/ruff format --check --quiet . || { echo "mend it with: $(BIN)/ruff format ."; exit 1; }
	@echo "== ruff: lint"
	@$(BIN)/ruff check .

## types    mypy --strict
types: .venv/.installed
	@echo "== mypy --strict mpifedlora"
	@$(BIN)/mypy --strict mpifedlora

## docs     the documentation as a site in site/, with links checked; nothing is fetched
docs: .venv/.installed
	@echo "== mkdocs build --strict"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Three processes: of the tests that start Slurm or mpirun, most of the time is waiting.
## unit     unit tests, property tests and doctests; what launches mpirun itself is here too
unit: data
	@$(BIN)/mpifedlora data fetch mnist-5k
	@echo "== pytest: units, properties, doctests"
	@. tests/mpi_env.sh && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -q -n 3 -m "not network"

## mpi      tests over real MPI with 1, 2, 3 and 5 processes
mpi: data
	@echo "== pytest over MPI: 1, 2, 3 and 5 processes"
	@tests/run_mpi.sh

## bench    quick forms of the benchmarks, some minutes; warns where a ratio is worse than committed
bench: data
	@echo "== benchmarks: quick forms, results in runs/bench/"
	@benchmarks/quick.sh runs/bench

## slurm-cluster       a throw-away Slurm cluster of two nodes on this machine, to play with
slurm-cluster:
	@tests/slurm/cluster.sh start

## slurm-cluster-stop  remove it, with its jobs
slurm-cluster-stop:
	@tests/slurm/cluster.sh stop

## torture  a hundred runs hit at random: kills, stops, signals; about twenty minutes
torture: .venv/.installed
	@. tests/mpi_env.sh && PYTHONPATH=tests python -m faults.torture

## fuzz     thousands of damaged and hostile files, read in ten minutes at most; FUZZ_TIMES=12 by default
fuzz: .venv/.installed
	@. tests/mpi_env.sh && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FUZZ_TIMES=$${FUZZ_TIMES:-12} \
	    timeout 600 python -m pytest -q tests/test_fuzz.py

## data     fetch the demo's data set and weights into the cache folder
data: .venv/.installed
	@echo "== data: 20 Newsgroups and the MiniLM weights"
	@$(BIN)/mpifedlora data fetch 20newsgroups minilm

## install  the package with its tools and Open MPI, in .venv
install: .venv/.installed

NEEDS := mpifedlora needs Python 3.10 or newer
NAME_ONE := name one: make PYTHON=python3.12

.venv/.created:
	@echo "== virtual environment in .venv"
	@command -v "$(PYTHON)" >/dev/null || { echo "$(NEEDS), found no $(PYTHON); $(NAME_ONE)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(NEEDS), got $$("$(PYTHON)" --version); $(NAME_ONE)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) must have the module venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv
	@touch $@

.venv/.installed: .venv/.created setup.cfg pyproject.toml constraints.txt
	@echo "== pip install -c constraints.txt -e .[mpi,dev,docs,trackers] (some minutes, the first time)"
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check $(PIP_FLAGS) \
	    -c constraints.txt -e '.[mpi,dev,docs,trackers]'
	@touch $@

## clean    remove .venv, caches and build files; runs/ and the fetched data stay
clean:
	rm -rf .venv build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mpifedlora tests -name __pycache__ -prune -exec rm -rf {} +

help:
	@sed -n 's/^## /make /p' Makefile
