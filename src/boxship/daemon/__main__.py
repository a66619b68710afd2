"""`python -m boxship.daemon`: the daemon, as the boxship command starts it.

Runs in: the daemon.
"""

import sys

from boxship.daemon.entry import boxshipd

sys.exit(boxshipd())
