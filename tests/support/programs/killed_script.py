# SPDX-License-Identifier: Apache-2.0
"""A script that kills itself at a call of a method: OWNER METHOD CALL SCRIPT ARGUMENTS; of OWNER, module and class."""

import importlib
import os
import signal
import sys

from tests.support.script_run import call_script
from tests.training.test_resume import killed_at

place, method, call, *command = sys.argv[1:]
module, _, owner = place.rpartition(".")
owner = getattr(importlib.import_module(module), owner)
with killed_at(owner, method, int(call), lambda: os.kill(os.getpid(), signal.SIGKILL)):
    call_script(*command)
