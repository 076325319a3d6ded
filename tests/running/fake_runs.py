"""Runs that take no time, for worker processes: what each does follows from its seed."""

import json
import logging
import os
import signal

from fedexperts.config.load import resolved_toml
from fedexperts.errors import UserError


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fake_run(config, run_directory, *, progress, resume):
    run_directory.mkdir(parents=True)
    (run_directory / "config.toml").write_text(resolved_toml(config))
    progress.phase("loading")
    match config.seed:
        case 1:
            raise UserError("loss is nan")
        case 2:
            raise ZeroDivisionError("division by zero")
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
        case 4:
            raise Unpicklable("this", "that")
        case 5:
            logging.getLogger("fedexperts.fake").warning("%s is strange", "the weather")
        case 6:
            raise OSError(28, "No space left on device")
    result = {"mean": {"validation_loss_after": config.seed}, "pid": os.getpid()}
    (run_directory / "result.json").write_text(json.dumps(result))
    return result
