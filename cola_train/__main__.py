"""`python -m cola_train`."""

import sys

from cola_train.cli import main

sys.exit(main())
