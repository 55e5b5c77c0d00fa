"""``python -m netnsd.client``: the same as ``netnsctl``."""

import sys

from netnsd.client.cli import main

if __name__ == "__main__":
    sys.exit(main())
