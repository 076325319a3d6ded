"""Complete the settings of a run that ``flwr run`` submits by itself, without this package's launcher."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedexperts.errors import UserError

RUNS = Path("~/fedexperts-runs")
"""Where run directories are that nobody names. The working directory of Flower's programs may be any."""


def is_launched(run_config: Mapping[str, Any]) -> bool:
    """Return whether the launcher has filled the settings in and made the run directory."""
    return bool(run_config.get("run-token"))


def completed(run_config: Mapping[str, Any], run_id: int) -> dict[str, Any]:
    """Return the settings of a run, those of the launcher as they are; server and clients find the same.

    Raises:
        UserError: the experiment is no TOML.
    """
    given = dict(run_config)
    if is_launched(given):
        return given
    try:
        experiment = tomllib.loads(str(given["experiment"]))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"experiment in pyproject.toml is not valid TOML: {error}") from None
    transport = experiment.setdefault("transport", {})
    transport["name"] = "flower"
    folder = Path(str(given.get("run-directory") or RUNS / f"flower-{run_id}")).expanduser().absolute()
    is_simulated = not transport.get("connection")
    return {
        "experiment": tomli_w.dumps(experiment),
        "run-directory": str(folder),
        "run-token": f"{run_id:016x}",
        "personal-folder": str(folder / "clients") if is_simulated else "",
    }
