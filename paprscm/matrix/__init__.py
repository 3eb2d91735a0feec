# SPDX-License-Identifier: GPL-2.0-or-later
"""Cells of a matrix of kernels, QEMUs and machines: their choice, division and common grid."""
