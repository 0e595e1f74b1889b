# SPDX-License-Identifier: Apache-2.0
"""Model cards, pictures, and pushes to the Hub."""
