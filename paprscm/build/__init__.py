# SPDX-License-Identifier: GPL-2.0-or-later
"""Build what guests consist of: kernel, initramfs, root file system."""
