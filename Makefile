# SPDX-License-Identifier: GPL-2.0
# The front door; scripts/ does the work and can be called directly.
O ?= release
export O CMD
FOR = demo
check check-full: FOR = check
mutants host-test: FOR = test

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: ## a stale registration, without and with notification, in a guest
	@scripts/demo
test: ## every test, on the host and in guests
	@scripts/test
check: tree ## lint and check the series
	@scripts/check
check-full: tree ## what of that takes long: each patch, each configuration
	@scripts/check ci/full
mutants: tree ## mutation tests: every patch in ci/mutations must make a test fail
	@scripts/mutation-test
bench: ## what watching costs, in instructions
	@scripts/bench
stress: ## the random tests on the debug kernel, again and again
	@scripts/stress
host-test: tree ## the tests that need no kernel
	@scripts/programs scripts/host-test
boot: build ## a shell in the guest; CMD='...' runs that instead; O=release|debug
	@scripts/boot "$$O" boot "$$CMD"
build: tree ## build the kernel O=release|debug
	@scripts/build "$$O"
tree: ## bring build/linux to Linux plus the series
	@scripts/setup $(FOR)
	@scripts/tree
refresh: ## export the commits of build/linux to patches/linux
	@scripts/refresh
setup: ## install what all of these need
	@scripts/setup
clean: ## remove the kernels and programs built, not the source tree
	rm -rf build/release build/debug build/off build/each* build/patched* build/headers build/cargo build/bare build/out

.PHONY: help demo test check check-full mutants bench stress host-test boot build tree refresh setup clean
