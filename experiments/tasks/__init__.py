# SPDX-License-Identifier: Apache-2.0
"""From data to a prepared task: what a model sees, and how it is scored."""
