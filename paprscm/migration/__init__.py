# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration: the stream, its transfer between two QEMUs, and flushes that are pending in it."""
