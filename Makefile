# Two commands do everything on a fresh machine; both install what they need into .venv:
#   make demo    a small AnyFlow pipeline, exported, validated and generated from
#   make test    lint, types, tests   (make test-unit: two minutes of them)
# Python 3.10 to 3.13 is needed; choose another than python3 with PYTHON=…

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo

.PHONY: demo shapes gpu test test-unit test-slow test-oldest test-triton test-cpp-tensorrt fuzz-cpp lint lint-files docs format image bench clean

demo: $(READY)
	@rm -rf $(DEMO) && mkdir $(DEMO)
	$(BIN)/python -m anyflow_deploy.checkpoints.tiny $(DEMO)/pipeline
	$(BIN)/anyflow-export --checkpoint $(DEMO)/pipeline --output $(DEMO)/bundle --check none
	$(BIN)/anyflow-inspect $(DEMO)/bundle --verify
	$(BIN)/anyflow-validate $(DEMO)/bundle
	$(BIN)/anyflow-generate $(DEMO)/bundle --prompt "a red fox walks in the snow" --steps 4 --output $(DEMO)/video.mp4
	@echo
	@echo "A complete AnyFlow pipeline, small and with random weights (its pictures are noise):  $(DEMO)/pipeline/"
	@echo "The bundle exported from it, ready for any device:                                  $(DEMO)/bundle/"
	@echo "How far its engine is from PyTorch, as numbers and as a picture:                    $(DEMO)/bundle/validation.json, validation.png"
	@echo "The video:                                                                          $(DEMO)/video.mp4"
	@echo "With real weights the same commands start from: anyflow-export --model 1.3b"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 -m "not slow and not triton"

# What needs no exported graph, compiler or server: seconds to two minutes.
test-unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/unit

# What takes minutes of compiling: causal streams and fp8 through AOTInductor.
test-slow: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/pytest -m slow

# Train the models of assets/ from nothing: hours on two cores, and it resumes where it was stopped.
SHAPES := runs/shapes
shapes: $(READY)
	$(BIN)/python -m anyflow_deploy.shapes $(SHAPES)

# The lowest version of every direct dependency that pyproject.toml allows, in a venv of its own. uv
# reads its UV_… variables: UV_FIND_LINKS and UV_OVERRIDE can name a torch without CUDA.
OLDEST := .oldest
OLDEST_NAMES := bundle calibration checkpoint deadline diffusers_adapter engine generate golden golden_train models \
	options schedule serve
OLDEST_TESTS ?= $(foreach name,$(OLDEST_NAMES),$(wildcard tests/*/test_$(name).py))
test-oldest:
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		-e '.[cpu,export,quantize,serve,train,dev]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(OLDEST_TESTS)

# The model repository in the real Triton Inference Server, which comes out of a wheel (Python 3.10 to 3.12); three minutes.
test-triton: $(READY)
	$(BIN)/python -m tests.triton_server .triton
	OMP_NUM_THREADS=2 $(BIN)/pytest -m triton tests/integration/test_tritonserver_real.py tests/integration/test_examples.py --durations=5

# The C++ library's readers of files under mutated ones, for some minutes. FUZZ_ROUNDS=… for longer.
FUZZ_ROUNDS ?= 1000000
fuzz-cpp: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S engines/cpp -B build/fuzz -G Ninja -DANYFLOW_PYTHON=$(CURDIR)/$(BIN)/python -DANYFLOW_TESTS=ON \
		-DANYFLOW_AOTINDUCTOR=OFF -DANYFLOW_TENSORRT=OFF -DANYFLOW_EXAMPLES=OFF -DANYFLOW_SANITIZE=address,undefined
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/fuzz
	$(BIN)/python -m tests.cpp_fuzz build/fuzz/tests $(FUZZ_ROUNDS)

# The C++ library's TensorRT backend on a fake machine, against NVIDIA's headers of three releases and those of TensorRT for
# RTX (fetched into .cache); and against the real library of the latter, where its wheel is.
test-cpp-tensorrt: $(READY)
	for release in 10.3 10.16 11.1 rtx-1.6; do \
		headers=$$($(BIN)/python tools/tensorrt_headers.py $$release) || exit 1; \
		ANYFLOW_TENSORRT_HEADERS=$$headers/tensorrt:$$headers/cuda $(BIN)/pytest -q \
			tests/integration/test_cpp_tensorrt.py tests/integration/test_cpp_tensorrt_rtx.py || exit 1; \
	done

lint: $(READY) lint-files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# What is neither Python nor C++: the Dockerfile, the workflow, the issue forms, the citation.
CHECK := $(BIN)/check-jsonschema --quiet --builtin-schema
lint-files: $(READY)
	$(BIN)/hadolint Dockerfile
	$(CHECK) vendor.github-workflows .github/workflows/ci.yml
	$(CHECK) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(CHECK) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(CHECK) vendor.citation-file-format CITATION.cff

# The documents as a site, in build/site. A warning is an error: a broken link, a page that is in no menu.
docs: $(READY) $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

$(VENV)/.docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The container of anyflow-serve; RUNTIME=gpu for ONNX Runtime with CUDA.
RUNTIME ?= cpu
image:
	docker build --tag anyflow-serve:$(RUNTIME) --build-arg RUNTIME=$(RUNTIME) .

bench: $(READY)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/causal.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/serve.py

# The versions in constraints.txt are the ones this was tested with.
$(READY): pyproject.toml constraints.txt anyflow_deploy/_version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,export,quantize,serve,train,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .triton $(DEMO) build dist .mypy_cache .ruff_cache .pytest_cache

# What a GPU can do, in eight minutes, with whatever is installed: needs torch 2.11 or newer. GPU="--tiny --device cpu" runs it in small.
GPU ?=
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_suite.py --output build/gpu/gpu.json $(GPU)
