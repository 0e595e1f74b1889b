# SPDX-License-Identifier: Apache-2.0
"""What each script does, from its arguments to what it leaves."""
