"""``python -m pantheraml``: the same as the command ``pantheraml``."""

import sys

from pantheraml.cli import main

sys.exit(main())
