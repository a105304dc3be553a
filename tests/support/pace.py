"""A plugin that slows down the steps of a run until a file exists, so that a test can disturb it meanwhile."""

import os
import time
from pathlib import Path

from rlinf_core import hookimpl

UNTIL = "PACE_UNTIL"
"""Variable: the file that ends the slow steps."""


@hookimpl
def rlinf_train_started(trainer):
    trainer.policy.register_forward_pre_hook(wait)


def wait(policy, arguments):
    if policy.training and not Path(os.environ[UNTIL]).exists():
        time.sleep(0.3)
