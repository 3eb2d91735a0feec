# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge persistent memory on POWER: spapr-nvdimm, H_SCM_FLUSH, papr_scm and MAP_SYNC."""
