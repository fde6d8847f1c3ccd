# SPDX-License-Identifier: GPL-2.0
# The front door; scripts/ does the work.
O ?= release
export O CMD
# What to set up for: the demo, the tests, or the checks, which need everything.
FOR = demo
test bench profile stress mutants host-test debug: FOR = test
check check-full: FOR = check
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: release ## a stale registration, without and with notification, in a guest
	@scripts/demo
test: debug release ## every test, on the host and in guests
	@scripts/test
check: tree ## lint and check the series
	@scripts/check
check-full: tree ## slow checks: every patch and every configuration
	@scripts/check ci/slow
mutants: debug ## mutation tests: every patch in ci/mutations must make a test fail
	@scripts/mutation-test
bench: release ## what watching costs, in instructions
	@scripts/bench
profile: release ## where those instructions go, by symbol
	@scripts/profile
stress: debug ## the random tests on the debug kernel, again and again
	@scripts/stress
host-test: tree ## the tests that need no kernel
	@scripts/with-headers scripts/host-test
boot: build ## a shell in the guest; CMD='...' runs that instead; O=release|debug
	@scripts/boot "$$O" boot "$$CMD"
build: tree ## build the kernel O=release|debug
	@scripts/build "$$O"
release debug: tree
	@scripts/build $@
tree: ## bring build/linux to Linux plus the series
	@scripts/setup $(FOR)
	@scripts/tree
refresh: ## export the commits of build/linux to patches/linux
	@scripts/refresh
setup: ## install what all of these need
	@scripts/setup
clean: ## remove the kernels and programs built, not the source tree
	rm -rf build/release build/debug build/off build/commit-* build/patched* build/headers build/cargo build/bare build/out

.PHONY: help demo test check check-full mutants bench profile stress host-test boot build release debug tree refresh setup clean
