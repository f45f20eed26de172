# Needs an environment with: pip install -e ".[dev]"
PYTHON ?= python
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc')

# The tests that reach the C++ code; `make sanitize` runs these.
NATIVE_TESTS ?= $(addprefix tests/,test_gemm.py test_attention.py test_norm.py test_quantize.py test_embedding.py \
                test_packing.py test_fuzz_native.py test_encoder.py test_gemm_int4.py test_recipe.py \
                test_attention_int16.py test_lm_head.py test_watch.py test_thread_pool.py test_openmp.py)
SANITIZE_DIR = build/sanitize
# libstdc++ comes along because Python does not link it: AddressSanitizer looks for its __cxa_throw at start-up.
SANITIZE_PRELOAD = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so) \
                   $(shell gcc -print-file-name=libstdc++.so.6)

# The tests that run on a GPU where there is one: those of benchmarks/gpu_battery.py (a test compares), and two of their own.
GPU_TESTS = $(addprefix tests/test_,played_cuda.py packing_triton.py triton_backend.py triton_precisions.py \
            artifact_triton.py attention_interface.py training.py attention_triton.py rows_triton.py gemm_triton.py \
            gemm_weight_only_triton.py gpu_battery.py tensorrt_backend.py)

.PHONY: check format test bench bench-kernels bench-peers static-gpu play-gpu play-amx test-libraries sanitize

check:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)
	mypy

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

test:
	pytest -q -n 2 --dist loadfile

# About three minutes: every stem on its most telling shapes.
bench:
	pytest -q benchmarks --benchmark-only -m quick --benchmark-max-time=0.3 --benchmark-columns=median,iqr,rounds

# Every stem on every shape: about twenty minutes.
bench-kernels:
	pytest -q benchmarks --benchmark-only --benchmark-json=kernels.json

# The comparison behind docs/performance.md: every peer that is installed, about an hour for each model.
BENCH_WORKLOADS = mixed,sorted,1x8,1x32,1x128,full
bench-peers:
	for model in base large; do \
	  xfast bench --model $$model --workload $(BENCH_WORKLOADS) --rounds 7 \
	    --json benchmarks/results/$$model.json --plot benchmarks/results/$$model.png || exit 1; \
	done

# Every Triton kernel in every form, compiled for NVIDIA GPUs without one (half an hour or more); needs an installed xfast.
static-gpu:
	TRITON_INTERPRET=0 $(PYTHON) -m xfast.benchmarks.static_gpu --json static-gpu.json

# The GPU tests on a GPU that is played on the CPU, then every form of launch compiled for a real one (tests/played_cuda.py).
play-gpu:
	rm -f build/launch-forms.jsonl && mkdir -p build
	PYTHONPATH=tests XFAST_LAUNCH_FORMS=build/launch-forms.jsonl pytest -q -n 2 --dist loadfile -p played_cuda $(GPU_TESTS)
	TRITON_INTERPRET=0 $(PYTHON) tests/launch_forms.py build/launch-forms.jsonl 90 > build/launch-forms-90.jsonl

# The AMX target with its instructions as plain code (csrc/gemm_amx.h), on CPUs with AVX-512 BF16: three minutes. Tests of
# whole encoders run on the target that is chosen by itself, which is this one there.
AMX_TESTS = $(addprefix tests/test_,gemm.py lm_head.py gemm_int4.py isa.py encoder.py recipe.py pre_norm.py)
play-amx:
	CMAKE_ARGS=-DXFAST_MODEL_AMX=ON $(PYTHON) setup.py -q build --build-base build/model-amx --build-lib build/model-amx/lib
	PYTHONPATH="$(CURDIR)/build/model-amx/lib" XFAST_MODEL_AMX=1 pytest -q -n 2 -p no:cacheprovider -k "amx or isa.py or encoder.py or recipe.py or pre_norm.py" $(AMX_TESTS)

# Libraries that hold an encoder and call it in their own way, in two environments, as some want transformers 4: about
# ten minutes and 6 GB under build/. setuptools to sentencepiece: what COMET's own requirements leave open and need.
LIBRARIES_5 = FlagEmbedding sentence-transformers bert-score setfit peft
LIBRARIES_4 = "transformers<5" unbabel-comet span-marker gliner flair \
              "setuptools<81" "pyarrow<21" "sentencepiece<0.2.1"
test-libraries:
	$(PYTHON) -m venv build/libraries-5 && $(PYTHON) -m venv build/libraries-4
	for venv in 5 4; do build/libraries-$$venv/bin/pip install -q torch==2.13.0 || exit 1; done
	build/libraries-5/bin/pip install -q . pytest hypothesis $(LIBRARIES_5)
	build/libraries-4/bin/pip install -q . pytest hypothesis $(LIBRARIES_4)
	for venv in 5 4; do HF_HUB_OFFLINE=1 build/libraries-$$venv/bin/pytest -q -rs tests/test_libraries.py || exit 1; done

# AddressSanitizer + UndefinedBehaviorSanitizer over the native tests: slow, meant for a nightly run.
# --capture=sys lets the sanitizers' reports, which end the process, through to the terminal.
# (Two tests limit the address space, in which AddressSanitizer's own memory does not fit.)
sanitize:
	CXX=g++ XFAST_SANITIZE=1 $(PYTHON) setup.py -q build --build-base $(SANITIZE_DIR) --build-lib $(SANITIZE_DIR)/lib
	PYTHONPATH="$(CURDIR)/$(SANITIZE_DIR)/lib" LD_PRELOAD="$(SANITIZE_PRELOAD)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  pytest -q -p no:cacheprovider --capture=sys -k "not extreme_sizes and not no_memory_to_work_in" $(NATIVE_TESTS)
