"""`python -m apical` is the command `apical`."""

import sys

from .cli import main

sys.exit(main())
