"""Serve a federation of sites, and take part in one as a site."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedexperts.config.build import to_table
from fedexperts.config.load import build_settings
from fedexperts.config.schema import RunConfig
from fedexperts.config.toml import render_toml
from fedexperts.data.federated import FederatedData, load_site_data
from fedexperts.data.settings import CLIENT_NAME, SITE, DataSettings, PartitionSettings
from fedexperts.errors import UserError
from fedexperts.federation.flower_launch import FlowerLink, ServerLostError
from fedexperts.federation.flower_link import CONNECTION, open_link, parse_address
from fedexperts.federation.site_settings import SiteSettings
from fedexperts.run_directory import RunDirectory, name_at_sites, write_atomically
from fedexperts.running.experiment import run_claimed
from fedexperts.running.progress import Progress
from fedexperts.site_seals import refuse_site

logger = logging.getLogger(__name__)

MOST_LOSSES = 5
"""Times in a row that the server's processes may be lost, without a round in between, before it gives up."""

PORT_SECONDS = 20.0
"""Longest wait for the port of a SuperLink that was killed: what it had started may hold it for a while."""

SERVER_OVERRIDES = ('transport.name="flower"', f'transport.connection="{CONNECTION}"')
"""Settings that the server's command puts in."""


def run_server(
    config: RunConfig,
    run_directory: Path,
    *,
    keys: Path,
    listen: str,
    progress: Progress,
    resume: bool = False,
) -> dict[str, Any]:
    """Start a SuperLink, wait for the sites, and run the experiment to its result.

    Where the server app or the SuperLink is killed, it is started again, and the run goes on after its last
    round.

    Raises:
        UserError: see :func:`open_link` and :func:`~fedexperts.running.experiment.run_experiment`; or fewer
            sites have keys than take part.
    """
    if resume:
        refuse_site(RunDirectory(run_directory), "resume")
    partition = config.data.partition
    if partition.kind != "site":
        raise UserError(
            f'data.partition.kind is "{partition.kind}"; for fedexperts server it must be "{SITE}" '
            f'(with data.source = "{SITE}")'
        )
    if not CLIENT_NAME.fullmatch(name_at_sites(run_directory, "0" * 8)):
        raise UserError(
            f"the run's folder is named {run_directory.name!r}, and sites name theirs after it: it must be "
            'of up to 91 letters, digits, ".", "_" and "-", the first a letter or digit (--to)'
        )
    address, run = parse_address(listen, "--listen"), RunDirectory(run_directory)
    with run.claim(resume=resume):
        return _serve(config, run, keys, listen, address, progress, resume=resume)


def _serve(
    config: RunConfig,
    run: RunDirectory,
    keys: Path,
    listen: str,
    address: tuple[str, int],
    progress: Progress,
    *,
    resume: bool,
) -> dict[str, Any]:
    num_losses = num_rounds = 0
    while True:
        with open_link(keys, *address, PORT_SECONDS if num_losses else 0.0) as link:
            _refuse_few_keys(config, keys, link)
            progress.message(
                f"waiting at {listen} for {config.data.partition.num_clients} of {', '.join(link.sites)}"
            )
            is_up = True
            while is_up:
                has_begun = link.is_up()
                try:
                    if not has_begun:
                        raise ServerLostError(f"the SuperLink at {listen} ends as soon as it has started")
                    return run_claimed(run, config, progress, resume=resume, link=link)
                except ServerLostError:
                    reached = max(run.kept_rounds(), default=0)
                    num_losses = 1 if reached > num_rounds else num_losses + 1
                    if num_losses == MOST_LOSSES:
                        raise
                    num_rounds, resume, is_up = reached, resume or has_begun, link.is_up()
                    lost = "process in Flower" if is_up else "SuperLink"
                    logger.warning("the server's %s was killed; going on after round %d", lost, num_rounds)


def _refuse_few_keys(config: RunConfig, keys: Path, link: FlowerLink) -> None:
    number = config.data.partition.num_clients
    if len(link.sites) < number:
        raise UserError(
            f"data.partition.num_clients is {number}, but {keys} has the keys of "
            f"{len(link.sites)} sites: {', '.join(link.sites)}"
        )


def prepare_site(
    name: str, source: str, folder: Path, overrides: Sequence[str] = ()
) -> tuple[Path, FederatedData]:
    """Write a site's settings to ``site.toml`` in its folder, and read its data once, as a check.

    Raises:
        UserError: a setting is wrong, or the data cannot be read.
    """
    path = Path(source).expanduser()
    table = {
        "name": name,
        "source": str(path.absolute()) if path.exists() else source,
        "folder": str(folder.absolute()),
    }
    settings = build_settings(SiteSettings, table, "site", overrides)
    shared = DataSettings(source=SITE, partition=PartitionSettings(kind="site", num_clients=1))
    data = load_site_data(settings.data(shared), settings.name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as restore:
        restore.callback(os.umask, os.umask(0o077))
        write_atomically(folder / "site.toml", render_toml(to_table(settings)).encode())
    return folder / "site.toml", data
