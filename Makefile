# Two commands set everything up by themselves: `make quickstart` and `make test`.
#
# Benchmarks write rows under benchmarks/results (docs/performance.md says how they measure):
#   bench-kernels    the operators against eager, torch's fused pieces and torch.compile
#   bench-step       one training step of PRESET against the reference's way, and the strong baseline on a GPU
#   bench-parts      what each part of that step gives: the step beside itself without the part
#   bench-sampling   a batch of samples of PRESET, SAMPLER=heun or dpmpp-2m
#   bench-audit      the search for nearest neighbours and a whole audit
#   bench-data       the three loaders against the reference's way, and how long a training step waits for data
#   loss-curve       2,000 steps of digits: does the fast path learn what the reference's arrangement learns?
#   gpu-suite        all of it on a GPU in MINUTES=8; DEVICE=cpu SCALE=tiny is the rehearsal, and measures nothing
#   tables           the tables of docs/performance.md and all of docs/results.md, from the rows
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
OUT    ?= runs/quickstart

PRESET  ?= digits
SAMPLER ?= heun
DEVICE  ?= cuda
SCALE   ?= full
MINUTES ?= 8

SOURCES := $(wildcard kernels/csrc/*/*) CMakeLists.txt setup.py pyproject.toml

.PHONY: install quickstart browser test test-slow test-gpu lint format bench-kernels bench-step bench-parts \
        bench-sampling bench-audit bench-data loss-curve gpu-suite tables reproduce-digits reproduce clean

install: $(STAMP)

# torch first: native code needs its headers, and a build without isolation finds them.
# The native libraries are built here, where a compiler is; without one the package is pure Python and works.
$(STAMP): $(SOURCES)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'fastambient needs Python 3.10 or newer, this is ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q "torch>=2.10" "numpy>=1.26" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	@touch $@

$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	@touch $@

quickstart: $(STAMP)
	$(BIN)/fastambient quickstart --out $(OUT) --force

# Tests use one thread each, so two processes take half the time on 2 cores; a file's tests stay in one.
PARALLEL := -n 2 --dist loadfile

# The report is tested in the system's Chromium. Where Debian's or Ubuntu's apt-get can install it, this does.
BROWSERS := chromium chromium-browser google-chrome
APT      := DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3
browser:
	@for name in $(BROWSERS); do \
	  if found=$$(command -v $$name); then echo "browser: $$found"; exit 0; fi; \
	done; \
	if ! command -v apt-get > /dev/null; then \
	  echo "browser: none of $(BROWSERS) is on the PATH, and there is no apt-get to install one; do it by hand"; exit 0; \
	fi; \
	root=; test "$$(id -u)" = 0 || root=sudo; \
	if test -n "$$root" && ! command -v sudo > /dev/null; then \
	  echo "browser: none of $(BROWSERS) is on the PATH; as root run: make browser"; exit 0; \
	fi; \
	$$root env $(APT) update; \
	$$root env $(APT) install -y --no-install-recommends chromium || \
	$$root env $(APT) install -y --no-install-recommends chromium-browser

# Triton's interpreter must be chosen before triton is imported, so its tests have a process of their own.
test: $(TEST_STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(wildcard tests/test_triton_*.py)

# Then all but the operators' own tests again, and those that come to no operator, with each implementation named: what
# cannot run it is then an error, where "auto" would fall back. Without a native library there is nothing to name, and
# the reason is printed.
NO_OPERATOR = $(patsubst %,tests/test_%.py,benchmarks_reproduce data_near_duplicates data_sources data_tables data_tars \
  evaluation_audit evaluation_embedders evaluation_features evaluation_frechet evaluation_likelihood \
  evaluation_memorization evaluation_moments evaluation_nearest_pictures evaluation_quality \
  evaluation_report evaluation_similarity nvml packaging pictures report_browser)
OTHER_TESTS = $(filter-out tests/test_kernels_% tests/test_triton_% $(NO_OPERATOR),$(wildcard tests/test_*.py))
NO_NATIVE   = import sys; from fastambient_kernels import _native; r = _native.missing("ambient_noise"); \
  r and print(f"not tested with FASTAMBIENT_IMPL=native: {r}"); sys.exit(r is None)
test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"
	FASTAMBIENT_IMPL=reference $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(OTHER_TESTS)
	$(BIN)/python -c '$(NO_NATIVE)' || \
	  FASTAMBIENT_IMPL=native $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(OTHER_TESTS)

test-gpu: $(TEST_STAMP)
	$(BIN)/python -m pytest -m gpu

bench-kernels: $(STAMP)
	$(BIN)/python benchmarks/kernels.py

bench-step: $(STAMP)
	$(BIN)/python benchmarks/step_time.py --preset $(PRESET)

bench-parts: $(STAMP)
	$(BIN)/python benchmarks/parts.py --preset $(PRESET)

bench-sampling: $(STAMP)
	$(BIN)/python benchmarks/sampling_latency.py --preset $(PRESET) --sampler $(SAMPLER)

bench-audit: $(STAMP)
	$(BIN)/python benchmarks/audit_time.py

bench-data: $(STAMP)
	$(BIN)/python benchmarks/data_loading.py

loss-curve: $(STAMP)
	$(BIN)/python benchmarks/loss_curve.py --plot docs/loss-curve.svg

gpu-suite: $(TEST_STAMP)
	$(BIN)/python benchmarks/gpu_suite.py --device $(DEVICE) --scale $(SCALE) --minutes $(MINUTES)

tables: $(STAMP)
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/reproduce_page.py

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastambient kernels/fastambient_kernels

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The table of docs/reproduce-digits.md: three seeds of EDM and of the ambient model, under 30 minutes on 2 cores.
reproduce-digits: $(STAMP)
	$(BIN)/python benchmarks/reproduce_digits.py --out runs/reproduce-digits --table docs/reproduce-digits.md

# docs/results.md: every baseline and three seeds; hours on 2 cores, resumable. SOURCE=pictures adds 16x16 and 32x32;
# SEEDS=0 now and SEEDS=1,2 later are one sweep, their rows join.
SOURCE ?=
PART   ?= digits,pictures,figures
SEEDS  ?= 0,1,2
reproduce: $(STAMP)
	$(BIN)/python benchmarks/reproduce.py --part $(PART) --seeds $(SEEDS) $(if $(SOURCE),--source $(SOURCE)) \
	  --table docs/results.md --rows benchmarks/results

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
