"""``python -m dynamo_runtime`` is the ``dynamo`` command."""

from dynamo_runtime._cli import main

raise SystemExit(main())
