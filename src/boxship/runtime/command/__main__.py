"""`python -m boxship.runtime.command`: what the native boxrun becomes when no warm worker is there."""

import os
import sys

from boxship.runtime.command.main import main

code = main()
socket = os.environ.get("BOXRUN_WARM_SOCKET")
if socket:
    from boxship.runtime.warm import launch

    launch(socket)
# Nothing of ours waits for the interpreter's tidying up.
sys.stdout.flush()
os._exit(code)
