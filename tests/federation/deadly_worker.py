"""Ends a worker with SIGKILL while it serves one client, once."""

import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path

from fedexperts.running.workbench import _open_runtime

VICTIM = "client-001"


@contextmanager
def open_deadly_runtime(config, data, weights, run_directory, tell):
    with _open_runtime(config, data, weights, run_directory, tell) as runtime:
        handle = runtime.handle

        def handle_or_die(client_id, download):
            died = run_directory / "died"
            if (client_id, download.task) == (VICTIM, "train") and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return handle(client_id, download)

        runtime.handle = handle_or_die
        yield runtime


def outside_of(inode, model, trained):
    """Names of the parameters, ``trained`` apart, that do not lie in the mapping of the file ``inode``."""
    lines = re.findall(r"^(\w+)-(\w+) \S+ \w+ \S+ (\d+)", Path("/proc/self/maps").read_text(), re.M)
    ranges = [range(int(start, 16), int(end, 16)) for start, end, number in lines if int(number) == inode]
    return [
        name
        for name, parameter in model.named_parameters()
        if name not in trained and not any(parameter.data_ptr() in mapped for mapped in ranges)
    ]


def outside_of_in_worker(runtime, inode):
    return outside_of(inode, runtime.parts.model, runtime.parts.lora_names)
