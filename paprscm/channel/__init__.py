# SPDX-License-Identifier: GPL-2.0-or-later
"""Ways to talk to a guest: its console, ssh, and the agent."""
