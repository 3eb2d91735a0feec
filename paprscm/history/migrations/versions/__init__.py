# SPDX-License-Identifier: GPL-2.0-or-later
"""One module for each version; a released one does not change any more.

They change tables only. Rows are computed again from the records after a migration (rows.py).
"""
