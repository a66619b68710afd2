"""Entry point of the helper."""

import sys

from boxship.network.proxy.helper import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
