# SPDX-License-Identifier: Apache-2.0
"""Tasks: read data, turn them into model inputs, and score predictions."""
