"""`python -m cola_train`."""

from cola_train.cli import run

run()
