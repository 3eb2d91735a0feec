# SPDX-License-Identifier: GPL-2.0-or-later
# The two commands of the README. Both do all their own set-up, and are quick the second time.

.PHONY: suite test setup clean

# Options for `avocado run`, such as ARGS="-p qemu=debian:trixie".
ARGS ?=
TESTS ?= tests/

suite: setup
	@PAPRSCM_RUN=$$PPID .venv/bin/avocado run $(ARGS) $(TESTS)

# Quick parts first: a mistake in a name should not wait for a guest.
test: setup
	@.venv/bin/pytest -q -m "not guest and not slow"
	@.venv/bin/paprscm image
	@.venv/bin/pytest -q -m "guest and not slow"

setup:
	@tools/setup

clean:
	rm -rf .venv results *.egg-info .mypy_cache .pytest_cache .ruff_cache
