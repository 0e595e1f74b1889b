# SPDX-License-Identifier: Apache-2.0
"""Arguments of merging. Imports models and configs only: no datasets, no Trainer."""
