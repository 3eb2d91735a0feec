# SPDX-License-Identifier: GPL-2.0-or-later
# The two commands of the README. Both do all their own set-up, and are quick the second time.

.PHONY: suite test browser setup clean

# Options for `avocado run`, such as ARGS="-p qemu=debian:trixie".
ARGS ?=
TESTS ?= tests/

# make is part of the run, and everything ends with it: its process id and its start time.
RUN = PAPRSCM_RUN=$$PPID:$$(sed 's/.*) //' /proc/$$PPID/stat | cut -d ' ' -f 20)

suite: setup
	@$(RUN) .venv/bin/avocado run $(ARGS) $(TESTS)

# Quick parts first: a mistake in a name should not wait for a guest. One process more than CPUs,
# because some tests wait; at most 8, each of which takes 0.5 GB.
PROCESSES = $$(cpus=$$(nproc); echo $$((cpus < 8 ? cpus + 1 : 8)))
test: setup
	@$(RUN) .venv/bin/pytest -q -n $(PROCESSES) --dist worksteal -m "not guest and not slow"
	@$(RUN) .venv/bin/paprscm image
	@$(RUN) .venv/bin/pytest -q -n 2 -m "guest and not slow"

# The site of `paprscm report` in a browser; screenshots in results/browser. Not a part of `test`:
# Chromium is a download of 100 MB.
browser: setup
	@command -v chromium >/dev/null || \
		$$([ "$$(id -u)" -eq 0 ] || echo sudo) apt-get install -q -y \
		--no-install-recommends chromium fonts-dejavu-core
	@.venv/bin/python -m pip install -q --disable-pip-version-check -e '.[browser]'
	@mkdir -p results
	@$(RUN) .venv/bin/pytest -q --basetemp=results/browser selftests/report/test_browser.py

setup:
	@tools/setup

clean:
	rm -rf .venv results *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage*
