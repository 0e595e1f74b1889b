# SPDX-License-Identifier: Apache-2.0
"""Command line arguments of merging, and merging methods used as controls. Imports no datasets and no Trainer."""
