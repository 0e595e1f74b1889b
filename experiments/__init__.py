# SPDX-License-Identifier: Apache-2.0
"""Shared code of the scripts: tasks, merging arguments, training, runs and publishing."""
