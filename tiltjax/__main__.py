"""`python -m tiltjax` runs the command `tiltjax`."""

import sys

from tiltjax.cli import main

sys.exit(main())
