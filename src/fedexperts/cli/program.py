"""Entry point: parse the arguments, run the command, turn errors into one line and an exit code."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from fedexperts.cli.exit_codes import INTERRUPTED, MISTAKE, SOME_FAILED, Interrupted
from fedexperts.cli.parser import build_parser
from fedexperts.cli.settings_as_options import refuse_setting_as_option
from fedexperts.errors import UserError, is_disk_full


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's mistake is one line on stderr."""
    try:
        given = _parse(sys.argv[1:] if arguments is None else arguments)
        return int(given.command(given))
    except UserError as error:
        return _told(f"error: {error}", MISTAKE)
    except (Interrupted, KeyboardInterrupt) as error:
        return _told(str(error) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone, as in `fedexperts check FILE | head`; without this Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SOME_FAILED
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        return _told(f"error: {error.filename}: {error.strerror}", MISTAKE)
    except Exception as error:
        if is_disk_full(error):
            return _told(
                f"error: the disk is full ({error}): make room and resume, finished rounds are kept", MISTAKE
            )
        raise


def _told(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _parse(arguments: Sequence[str]) -> Namespace:
    """Arguments by name; overrides may also follow an option, which argparse alone does not take."""
    parser = build_parser()
    given, rest = parser.parse_known_args(arguments)
    refuse_setting_as_option(given.command.__name__, arguments, rest)
    if rest and (any(one.startswith("-") for one in rest) or not hasattr(given, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        given.overrides = [*given.overrides, *rest]
    return given
