"""The Flower server app: the server's side of a run, on the machine of the SuperLink."""

import json
import logging
import math
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedexperts.config.load import build_config, config_sha256, resolved_toml
from fedexperts.config.schema import RunConfig
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.data.federated import no_data
from fedexperts.errors import UserError
from fedexperts.federation.flower_events import FAILED, WarningsSaid, said_progress, say
from fedexperts.federation.flower_nodes import Sites
from fedexperts.federation.flower_sent import Patience
from fedexperts.federation.flower_submitted import completed, is_launched
from fedexperts.federation.flower_transport import FlowerTransport
from fedexperts.process_memory import return_freed_blocks
from fedexperts.releases import read_releases, write_releases
from fedexperts.run_directory import RunDirectory, write_atomically
from fedexperts.running.experiment import ServerRun, environment_of
from fedexperts.running.progress import PlainProgress, Progress
from fedexperts.running.workbench import open_workbench, personal_store
from fedexperts.seals import write_sealed

PROBE_SECONDS = 120.0

# Flower looks for this assignment in the source, and takes no annotated one.
app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run all rounds that are left and write the run directory; what fails is said and raised."""
    if not is_launched(context.run_config):
        _serve_submitted(grid, completed(context.run_config, context.run_id))
        return
    logging.getLogger("fedexperts").addHandler(WarningsSaid())
    try:
        config = build_config(tomllib.loads(str(context.run_config["experiment"])), "experiment")
        keys = json.loads(str(context.run_config.get("sites", "")) or "{}")
        run = RunDirectory(Path(str(context.run_config["run-directory"])))
        serve(grid, config, run, {int(node_id): str(name) for name, node_id in keys.items()})
    except UserError as error:
        say(FAILED, str(error))
        raise


def _serve_submitted(grid: Grid, settings: Mapping[str, str]) -> None:
    """Run what ``flwr run`` has submitted by itself: make the run directory, and tell a person in the log."""
    logger = logging.getLogger("fedexperts")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)
    logger.propagate = False  # ray logs as well what reaches the root
    config = build_config(tomllib.loads(settings["experiment"]), "experiment")
    run = RunDirectory(Path(settings["run-directory"]))
    with run.claim(resume=False):
        write_atomically(run.config, resolved_toml(config).encode())
        write_atomically(run.flower_token, settings["run-token"].encode())
        serve(grid, config, run, progress=PlainProgress())
    logger.info("the result is in %s; fedexperts report %s shows it", run.path, run.path)


def serve(
    grid: Grid,
    config: RunConfig,
    run: RunDirectory,
    keys: Mapping[int, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the server, which has the model and the exam, and no client's data.

    ``keys`` has the name of each site by the node id of its key. Without ``progress`` the launcher is told.
    """
    return_freed_blocks()  # of uploads: the server's memory does not depend on their number
    progress, stopwatch = progress or said_progress(), Stopwatch()
    with ExitStack() as stack:
        stack.enter_context(run.lock())
        # Said under the lock: from here on whoever has submitted the run sees by the lock that it goes on.
        progress.phase("loading the server's model")
        bench = stack.enter_context(open_workbench(config, stopwatch, data=no_data()))
        scorer = bench.scorer(personal_store(run.path))
        write_sealed(run.environment, environment_of(bench) | _simulated(config))
        transport = FlowerTransport(
            grid,
            config_sha256=config_sha256(config),
            patience=_patience(config),
            spool_folder=run.path,
            sites=_sites(config, keys or {}),
            asks_again=release_counter(config, run),
        )
        progress.phase("waiting for the clients")
        progress.message(f"{len(transport.clients)} clients have joined")
        ServerRun(config, run, scorer, transport, progress, stopwatch).run()


def release_counter(config: RunConfig, run: RunDirectory) -> Callable[[str], None]:
    """Return what counts a further upload that a client noises; the server noises a mean once."""

    def count(client_id: str) -> None:
        write_releases(run.releases, read_releases(run.releases).with_turn(client_id))

    is_noised = config.privacy.is_on and config.privacy.noise == "client"
    return count if is_noised else lambda client_id: None


def _patience(config: RunConfig) -> Patience:
    """Return how long to wait, and for whom."""
    return Patience(
        answer_seconds=config.transport.timeout_seconds,
        round_seconds=config.transport.round_seconds,
        wanted=config.cohort.wanted,
        # Flower's simulation answers a node's messages side by side, and its nodes do not die.
        probe_seconds=PROBE_SECONDS if config.transport.connection else math.inf,
        needs_all=config.cohort.on_failure == "stop",
    )


def _sites(config: RunConfig, keys: Mapping[int, str]) -> Sites | None:
    partition = config.data.partition
    return Sites(number=partition.num_clients, keys=keys) if partition.kind == "site" else None


def _simulated(config: RunConfig) -> dict[str, str]:
    if config.transport.connection:
        return {"simulated": ""}
    return {"simulated": "Flower's simulation: clients run on this machine; times are not a network's"}
