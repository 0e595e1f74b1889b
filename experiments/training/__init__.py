# SPDX-License-Identifier: Apache-2.0
"""Load, train, evaluate, and record the results in an output folder."""
