"""``python -m moba_cp`` is ``moba-cp``."""

import sys

from .cli import main

sys.exit(main())
