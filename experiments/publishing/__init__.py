# SPDX-License-Identifier: Apache-2.0
"""What others read: cards, pictures, the Hub."""
