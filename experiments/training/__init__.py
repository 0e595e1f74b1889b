# SPDX-License-Identifier: Apache-2.0
"""Loading, training and evaluating, and the folders that hold what came of it."""
