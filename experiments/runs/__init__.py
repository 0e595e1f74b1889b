# SPDX-License-Identifier: Apache-2.0
"""Runs: everything a script does, from its arguments to its output folder."""
