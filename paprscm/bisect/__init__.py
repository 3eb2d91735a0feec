# SPDX-License-Identifier: GPL-2.0-or-later
"""The commit that broke or fixed something: git's bisection with builds and tests."""
