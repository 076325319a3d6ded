"""Ends processes of a federation with SIGKILL at a named point of a run.

Python imports this module in every process of a deployment whose ``PYTHONPATH`` has its folder. A point is an
audit event: the import of a module, or a file in the deployment's folder that is opened for writing, renamed
or removed. The processes end before it happens. A file in the folder is a queue of plans, each for one time.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

FOLDER = os.environ.get("DEADLY_FOLDER", "")
ME = "\0".join(sys.orig_argv)
PATHS = {"open": 0, "os.rename": 1, "os.remove": 0}
"""Events of files, and the argument that has the path."""
_busy = []


def place_of(event, arguments):
    """Return what is imported, or written in the deployment's folder; nothing for any other event."""
    if event == "import":
        return arguments[0] if arguments[0].startswith("fedexperts") else ""
    if event not in PATHS or isinstance(arguments[PATHS[event]], int):
        return ""
    if event == "open" and not (arguments[1] or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return ""
    if event == "open" and arguments[1] and not set(arguments[1]) & set("wax"):
        return ""
    path = os.path.abspath(os.fsdecode(arguments[PATHS[event]]))
    return path if path.startswith(FOLDER) else ""


def is_one(command, wanted):
    """Whether a command line, its arguments divided by NUL, is of a wanted program (and of a wanted site)."""
    program, _, site = wanted.partition(" of ")
    return program in command and not command.startswith("sh\0") and site in command


def is_there(plan, event, place):
    return (
        plan["event"] == event
        and place.endswith(plan["place"])
        and is_one(ME, plan["at"])
        and (not plan["after"] or any(Path(FOLDER).glob(plan["after"])))
    )


def members():
    """Process ids and command lines of the deployment."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and f"DEADLY_FOLDER={FOLDER}\0" in (entry / "environ").read_text():
                yield int(entry.name), (entry / "cmdline").read_text()


def put(path, plans):
    """Make ``plans`` the queue of a file, whole or not at all; none leave no file."""
    if plans:
        path.with_suffix(".part").write_text(json.dumps(plans))
        path.with_suffix(".part").rename(path)


def die(event, arguments):
    if _busy or not (place := place_of(event, arguments)):
        return
    _busy.append(place)
    for path in Path(FOLDER).glob("plan-*.json"):
        with suppress(OSError):
            plan, *rest = json.loads(path.read_text())
            if is_there(plan, event, place):
                path.rename(path.with_suffix(".done"))
                put(
                    path, rest
                )  # at once: whoever is spared goes on, and its next moment may be the next plan's
                doomed = [pid for pid, line in members() if any(is_one(line, one) for one in plan["kill"])]
                with Path(FOLDER, "deaths.jsonl").open("a") as file:
                    file.write(json.dumps({**plan, "killed": len(doomed)}) + "\n")
                for pid in sorted(doomed, key=lambda pid: pid == os.getpid()):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
    _busy.clear()


if FOLDER:
    sys.addaudithook(die)
