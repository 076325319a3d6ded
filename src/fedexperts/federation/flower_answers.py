"""Answer a message of Flower's as the one client that a node is; one way for every algorithm.

The process keeps data and model for as long as it lives: a simulation's for the run, a node's worker for the
SuperNode (:mod:`fedexperts.federation.flower_worker`).
"""

import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedexperts.config.load import build_config, config_sha256
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.federation.flower_post import IDENTIFY
from fedexperts.federation.flower_site import SITE_KEY, answer_as_site
from fedexperts.federation.interruption import interruptible
from fedexperts.federation.personal import PersonalStore
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.federation.workers import encoded
from fedexperts.messages import Upload, decode_download
from fedexperts.running.workbench import Workbench, open_workbench

_open = ExitStack()
"""Holds the workbench open until the process ends."""


def answer_bytes(
    blob: bytes, run_config: Mapping[str, Any], node_config: Mapping[str, Any], refused: str = ""
) -> bytes:
    """Do what a download asks; a fault of the user's is an answer too, any other is Flower's to report.

    Args:
        blob: the download.
        run_config: of Flower's run.
        node_config: of Flower's node.
        refused: why there is no download in the message; empty where there is one.
    """
    try:
        site_file = str(node_config.get(SITE_KEY, ""))
        if refused:
            upload = Upload(failure=refused)
        elif site_file:
            upload = answer_as_site(blob, site_file, run_config)
        else:
            upload = _answer(blob, run_config, node_config)
    except UserError as error:
        upload = Upload(failure=str(error))
    return encoded(upload)


def _answer(blob: bytes, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Upload:
    download, experiment = decode_download(blob), str(run_config["experiment"])
    _refuse_own_data(experiment)
    folder, position = _personal_folder(run_config, node_config), _position(node_config)
    bench = _workbench(experiment)
    client_ids = bench.data.client_ids
    if position >= len(client_ids):
        raise UserError(f"partition-id is {position}, but the data has only {len(client_ids)} clients")
    if download.task != IDENTIFY:
        client_id = client_ids[position]
        return _runtime(experiment, client_id, folder).handle(client_id, download)
    if download.config_sha256 != config_sha256(bench.config):
        raise UserError("was started from another configuration than the server's")
    client_id = client_ids[position]
    report = {
        "client_id": client_id,
        "position": position,
        "num_clients": len(client_ids),
        "num_train": bench.data.num_examples(client_id, "train"),
        "memory_bytes": bench.memory_bytes[client_id],
    }
    return Upload(report=report)


def _refuse_own_data(experiment: str) -> None:
    """Raise UserError if the experiment asks for a site, which this node is not."""
    if build_config(tomllib.loads(experiment), "experiment").data.partition.kind == "site":
        raise UserError(
            'data.partition.kind is "site", but this node has no data of its own: start it with fedexperts '
            "site, or with --node-config 'site=\"/path/of/site.toml\"'"
        )


@lru_cache(maxsize=1)
def _workbench(experiment: str) -> Workbench:
    config = build_config(tomllib.loads(experiment), "experiment")
    return _open.enter_context(open_workbench(config, Stopwatch()))


@lru_cache(maxsize=8)
def _runtime(experiment: str, client_id: str, folder: Path) -> ClientRuntime:
    """A runtime over the resident model that sees no other client's data."""
    bench = _workbench(experiment)
    return (
        replace(bench, data=bench.data.only([client_id]))
        .scorer(PersonalStore(folder), interruptible())
        .runtime
    )


def _position(node_config: Mapping[str, Any]) -> int:
    position = node_config.get("partition-id")
    if not isinstance(position, int) or position < 0:
        raise UserError(
            f"partition-id is {position!r}; start the SuperNode with --node-config 'partition-id=N ...', "
            "N counting the data's clients from 0"
        )
    return position


def _personal_folder(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Path:
    """Return the folder of this node's client's tensors; in a deployment a folder of its own for each run."""
    simulated = str(run_config["personal-folder"])
    own = str(node_config.get("personal-folder", ""))
    if not simulated and not own:
        raise UserError(
            "the node has no place for its client's tensors: start the SuperNode with "
            "--node-config 'personal-folder=\"/a/folder\" ...'"
        )
    return Path(simulated) if simulated else Path(own) / str(run_config["run-token"])
