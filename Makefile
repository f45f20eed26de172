# Needs an environment with: pip install -e ".[dev]"
PYTHON ?= python
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc')

# The tests that reach the C++ code; `make sanitize` runs these.
NATIVE_TESTS ?= $(addprefix tests/,test_gemm.py test_attention.py test_norm.py test_quantize.py test_embedding.py \
                test_packing.py test_fuzz_native.py test_encoder.py)
SANITIZE_DIR = build/sanitize
# libstdc++ comes along because Python does not link it: AddressSanitizer looks for its __cxa_throw at start-up.
SANITIZE_PRELOAD = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so) \
                   $(shell gcc -print-file-name=libstdc++.so.6)

.PHONY: check format test bench sanitize

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
	pytest -q

bench:
	pytest -q benchmarks --benchmark-only

# AddressSanitizer + UndefinedBehaviorSanitizer over the native tests: slow, meant for a nightly run.
# --capture=sys lets the sanitizers' reports, which end the process, through to the terminal.
# (test_extreme_sizes limits the address space, in which AddressSanitizer's own shadow does not fit.)
sanitize:
	CXX=g++ XFAST_SANITIZE=1 $(PYTHON) setup.py -q build --build-base $(SANITIZE_DIR) --build-lib $(SANITIZE_DIR)/lib
	PYTHONPATH="$(CURDIR)/$(SANITIZE_DIR)/lib" LD_PRELOAD="$(SANITIZE_PRELOAD)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  pytest -q -p no:cacheprovider --capture=sys -k "not extreme_sizes" $(NATIVE_TESTS)
