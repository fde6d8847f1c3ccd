# SPDX-License-Identifier: GPL-2.0
# The front door; scripts/ does the work.
O ?= release
export O CMD
# The upstreams that 'tree' and 'refresh' are for.
S = linux rdma-core libfabric ucx
# What to set up for: the demo, the tests, the libraries, or the checks, which need
# everything.
FOR = demo
test bench bench-compare profile coverage stress mutants host-test debug: FOR = test
libraries: FOR = libraries
demo-mpi test-mpi: FOR = mpi
check check-full: FOR = check
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: release ## a stale registration, without and with notification, in a guest
	@scripts/demo
demo-mpi: release libraries ## the same with MPI: the distribution's libraries, and ours
	@scripts/demo-mpi
test: debug release libraries ## every test, on the host and in guests
	@scripts/test
test-mpi: release libraries ## the tests with MPI, on three stacks
	@scripts/mpi-suite release suite
check: tree ## lint and check the series
	@scripts/check
check-full: tree ## slow checks: every patch and every configuration
	@scripts/check ci/slow
mutants: linux ## mutation tests: every patch in ci/mutations must make a test fail
	@scripts/mutation-test
bench: release libraries ## what watching costs, in instructions, beside its peers; fails over a budget
	@scripts/bench
bench-compare: release libraries ## what a change did to that: BASE=REVISION, or BASE='BEFORE.json AFTER.json'
	@scripts/bench-compare $(BASE)
profile: build ## where those instructions go, by symbol; O=release|inline
	@scripts/profile
coverage: linux ## which lines of the series the tests execute; lists those that need a test
	@scripts/coverage
stress: debug release libraries ## random operations: MINUTES=10 on each kernel, then with MPI
	@scripts/stress $(MINUTES)
host-test: linux ## the tests that need no kernel
	@scripts/with-headers $(CURDIR)/scripts/host-test
boot: build ## a shell in the guest; CMD='...' runs that instead; O=release|inline|debug
	@scripts/boot "$$O" boot "$$CMD"
build: linux ## build the kernel O=release|inline|coverage|debug|kcsan|mutants
	@scripts/build "$$O"
release debug: linux
	@scripts/build $@
libraries: ## build rdma-core, libfabric and UCX with their patches
	@scripts/setup $(FOR)
	@set -e; for name in rdma-core libfabric ucx; do scripts/tree $$name; scripts/build-library $$name; done
linux:
	@scripts/setup $(FOR)
	@scripts/tree
tree: ## bring build/NAME to its upstream plus patches/NAME: each, or S=NAME
	@scripts/setup $(FOR)
	@set -e; for name in $(S); do scripts/tree $$name; done
refresh: S := $(or $(filter $(S),$(notdir $(wildcard build/*))),linux)
refresh: ## export the commits of build/NAME to patches/NAME: each, or S=NAME
	@set -e; for name in $(S); do scripts/refresh $$name; done
setup: ## install what all of these need
	@scripts/setup
clean: ## remove what was built and the guests' root folders, not the source trees
	rm -rf build/release build/inline build/coverage build/hostile build/debug build/modular build/kcsan build/mutants build/off build/arm64* build/riscv64 build/commit-* build/patched* build/headers* build/cargo build/bare build/out build/libraries build/mpi build/ucx-gtest build/go-cache build/kselftest build/kselftest-config

.PHONY: help demo demo-mpi test test-mpi check check-full mutants bench bench-compare profile coverage stress host-test boot build release debug libraries linux tree refresh setup clean
