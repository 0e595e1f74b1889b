# SPDX-License-Identifier: Apache-2.0
"""What merges: settings, cost, budgets, searches. Models and configs only: no datasets, no Trainer."""
