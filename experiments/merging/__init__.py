# SPDX-License-Identifier: Apache-2.0
"""Command line arguments of merging, and matching methods to compare. Imports neither `datasets` nor the Trainer."""
