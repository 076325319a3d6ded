"""Answer as a site: with its own data, in its own folder, telling the server no more than it must.

A run's folder at the site is a run directory of its one client, as ``generate``, ``export`` and ``report``
take it.
"""

import logging
import os
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedexperts.config.load import build_config, build_settings, config_sha256
from fedexperts.config.schema import RunConfig
from fedexperts.config.toml import read_toml
from fedexperts.data.settings import CLIENT_NAME
from fedexperts.errors import UserError
from fedexperts.federation.flower_post import IDENTIFY
from fedexperts.federation.interruption import interruptible
from fedexperts.federation.scoring import Scorer
from fedexperts.federation.site_settings import SiteSettings
from fedexperts.federation.site_telling import told
from fedexperts.messages import Upload, decode_download
from fedexperts.run_directory import RunDirectory, name_at_sites
from fedexperts.running.site_record import SiteRecord
from fedexperts.running.workbench import Workbench, open_site, personal_store

logger = logging.getLogger(__name__)

SITE_KEY = "site"
"""Key of a SuperNode's configuration: the path of the site's settings."""

UNTOLD = "it could not take its turn; the site's own log says why"
"""Failure that the server sees; a sentence about data is for the site."""

_open = ExitStack()
"""Holds the workbench open until the process ends."""


@dataclass(frozen=True, kw_only=True)
class _Site:
    """A site in one run."""

    settings: SiteSettings
    bench: Workbench
    scorer: Scorer
    record: SiteRecord


def read_site(path: Path) -> SiteSettings:
    """Read a site's settings from its ``site.toml``."""
    return build_settings(SiteSettings, read_toml(path), str(path))


def answer_as_site(blob: bytes, site_file: str, run_config: Mapping[str, Any]) -> Upload:
    """Answer one download; every fault is told in full here, and to the server only that there was one."""
    os.umask(0o077)
    try:
        return _answer(blob, site_file, run_config)
    except _Refusal as error:
        return Upload(failure=str(error))
    except Exception as error:
        logger.error("%s", error, exc_info=None if isinstance(error, UserError) else error)
        return Upload(failure=UNTOLD)


class _Refusal(UserError):
    """A reason that the server may know: it is about the experiment."""


def _answer(blob: bytes, site_file: str, run_config: Mapping[str, Any]) -> Upload:
    download = decode_download(blob)
    config = build_config(tomllib.loads(str(run_config["experiment"])), "experiment")
    if config.data.partition.kind != "site":
        raise _Refusal(
            f'is a site with its own data, but data.partition.kind is "{config.data.partition.kind}"'
        )
    if download.config_sha256 != config_sha256(config):
        raise _Refusal("was started from another configuration than the server's")
    site = _site(str(run_config["experiment"]), site_file, _run_name(run_config))
    site.record.hold()
    name = site.settings.name
    if download.task == IDENTIFY:
        return Upload(report=site.settings.facts(site.bench.data.num_examples(name, "train")))
    site.record.received(download, blob)
    upload = site.scorer.runtime.handle(name, download)
    if upload.failure:
        raise UserError(upload.failure)
    site.record.add(download, upload, len(blob))
    # With [privacy] every client weighs the same already.
    is_weighed = bool(upload.weights) and not config.privacy.is_on
    num_train = len(site.scorer.runtime.encoded(name)[0]) if is_weighed else 1
    return told(upload, site.settings, num_train)


@lru_cache(maxsize=1)
def _site(experiment: str, site_file: str, run_name: str) -> _Site:
    config, settings = build_config(tomllib.loads(experiment), "experiment"), read_site(Path(site_file))
    bench = _open.enter_context(open_site(config, settings))
    run = RunDirectory(Path(settings.folder) / "runs" / run_name)
    scorer = bench.scorer(personal_store(run.path), interruptible())
    record = SiteRecord(run, _as_here(config, settings), settings.name, scorer)
    return _Site(settings=settings, bench=bench, scorer=scorer, record=record)


def _as_here(config: RunConfig, settings: SiteSettings) -> RunConfig:
    """Return the configuration with which the site can open its model again."""
    return replace(config, model=replace(config.model, device=settings.device or config.model.device))


def _run_name(run_config: Mapping[str, Any]) -> str:
    """Return the name of the run's folder; the server names it, so it must be a plain name."""
    name = name_at_sites(Path(str(run_config["run-directory"])), str(run_config["run-token"]))
    if not CLIENT_NAME.fullmatch(name):
        raise _Refusal(f"the run's name {name!r} cannot be the name of a folder")
    return name
