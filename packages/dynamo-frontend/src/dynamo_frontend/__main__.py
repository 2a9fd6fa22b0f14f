"""``python -m dynamo_frontend``."""

import sys

from dynamo_frontend._cli import main

sys.exit(main())
