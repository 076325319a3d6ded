"""Keep, in a site's own folder, what the site needs to use and judge its model without the server.

It is a run directory of one client: the configuration, what the server last sent, the site's own lines and
scores, and at the end a ``result.json``. Nothing in it comes from other clients but the shared tensors.
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedexperts.algorithms.api import ServerState
from fedexperts.config.load import resolved_toml, to_table
from fedexperts.config.schema import RunConfig
from fedexperts.costs.traffic import PredictedBytes
from fedexperts.errors import UserError
from fedexperts.federation.rounds import RoundRecord, client_line
from fedexperts.federation.scoring import Scorer
from fedexperts.federation.transport import Delivery
from fedexperts.integrity import cut_logs
from fedexperts.messages import (
    Download,
    Expected,
    Upload,
    encode_upload,
    predict_download_bytes,
    predict_upload_bytes,
)
from fedexperts.run_directory import (
    GrowingHash,
    RunDirectory,
    append_lines,
    make_private,
    read_lines,
    write_atomically,
)
from fedexperts.running.environment import describe_environment
from fedexperts.running.experiment import client_scores, device_of
from fedexperts.running.result import ResultParts, build_result, describe_parameters
from fedexperts.seals import hash_of, read_sealed, seal_of_log, write_sealed, write_sealed_bytes
from fedexperts.site_seals import (
    check_logs,
    is_at_site,
    present_files,
    read_site_record,
    write_site_record,
)

Record = dict[str, Any]

LOCK_SECONDS = 60.0
"""Longest wait for the folder: a worker ends with its node, which takes its time when it is told to end."""


class SiteRecord:
    """Writes one run of one site."""

    def __init__(self, run: RunDirectory, config: RunConfig, name: str, scorer: Scorer) -> None:
        """Nothing is written or read."""
        self._run, self._config, self._name, self._scorer = run, config, name, scorer
        self._frozen = ""
        self._held = ExitStack()
        self._is_held = False

    def hold(self) -> None:
        """Keep other processes from changing the folder until the result is written; write its configuration.

        Raises:
            UserError: another process holds it, or what the site goes on from is missing or damaged.
        """
        if self._is_held:
            return
        make_private(self._run.path)
        with ExitStack() as stack:
            stack.enter_context(_lock(self._run))
            self._write_config(self._begun())
            self._held = stack.pop_all()
        self._is_held = True

    def _begun(self) -> Record:
        """Return the record of the last turn, and drop what a later one left that was killed."""
        run = self._run
        if not (is_at_site(run) or any(path.exists() for path in run.log_hashes)):
            return {"client": self._name, "files": {}, "present": [], "logs": {}, "forgotten": []}
        record = self._checked()
        if record["forgotten"]:
            raise UserError(f"cannot go on with {run.path}: {self._name} has been forgotten")
        cut_logs(run, record["logs"])
        return record

    def _checked(self) -> Record:
        """Return the record; raise UserError unless the logs are as it says."""
        record = read_site_record(self._run)
        check_logs(self._run, record)
        return record

    def _write_config(self, record: Record) -> None:
        """Write the configuration, with which the folder opens as a run; the site's device may be another."""
        run, content = self._run, resolved_toml(self._config).encode()
        files = {run.config.name: hash_of(content)}
        if record["files"] not in ({}, files):
            write_site_record(run, record | {"files": {}})
        write_atomically(run.config, content)
        write_site_record(run, record | {"files": files})

    def received(self, download: Download, blob: bytes) -> None:
        """Keep what the server sent last, before the turn that it asks for."""
        write_sealed_bytes(self._run.received(self._name), blob, is_private=True)
        if download.task == "evaluate_fully":
            self._frozen = self._scorer.runtime.model_sha256()

    def add(self, download: Download, upload: Upload, download_bytes: int) -> None:
        """Write what a turn has given, in full, whatever of it the server learns."""
        if download.task == "train":
            self._add_round(download, upload, download_bytes)
        elif download.task == "evaluate_base":
            write_sealed(self._run.base, {"exam": {}, "clients": {self._name: client_scores(upload)}})
        elif download.task == "evaluate_fully":
            self._finish(download, upload)
        self._seal()
        if download.task == "evaluate_fully":
            self._held.close()
            self._is_held = False

    def _seal(self) -> None:
        run = self._run
        logs = {path.name: GrowingHash(path).seal() for path in run.log_hashes}
        write_site_record(run, read_site_record(run) | {"present": present_files(run), "logs": logs})

    def _drop_rounds_after(self, last_round: int) -> None:
        """Drop the lines of rounds that are taken again: after a crash, or because the server went back."""
        run, record = self._run, self._checked()
        cut_logs(run, record["logs"])
        logs = {path.name: _seal_until(path, last_round) for path in run.log_hashes}
        write_site_record(run, record | {"logs": logs})
        cut_logs(run, logs)

    def _add_round(self, download: Download, upload: Upload, download_bytes: int) -> None:
        number, run = download.round_number, self._run
        self._drop_rounds_after(number - 1)
        delivery = Delivery(
            client_id=self._name,
            upload=upload,
            download_bytes=download_bytes,
            upload_bytes=len(encode_upload(upload)),
        )
        due = Expected(tensors=upload.tensors, beside=upload.beside, tables=upload.tables)
        predicted = PredictedBytes(
            upload=predict_upload_bytes(due), download=predict_download_bytes(download.sent)
        )
        line = client_line(delivery, number, predicted)
        record = RoundRecord(round_number=number, cohort=(self._name,), clients=[line])
        record.seconds = {**line["seconds"], "total": sum(line["seconds"].values())}
        append_lines(run.clients, [line])
        append_lines(run.rounds, [record.line(_shared(download))])

    def _finish(self, download: Download, upload: Upload) -> None:
        self._checked()
        run, runtime, data = self._run, self._scorer.runtime, self._scorer.runtime.data
        environment = describe_environment(self._config.threads, str(device_of(runtime.parts)))
        write_sealed(run.environment, environment | {"simulated": ""})
        with runtime.preview(download.sent):
            shared = Expected(tensors=download.sent.tensors)
            parameters = describe_parameters(runtime.algorithm, runtime.parts, download.sent, shared)
        result = build_result(
            ResultParts(
                name=run.path.name,
                config=to_table(self._config),
                state=_shared(download),
                scores={self._name: client_scores(upload)},
                base=read_sealed(run.base),
                subjects=self._scorer.subjects,
                exam_global={},
                retention_global={},
                rounds=read_lines(run.rounds),
                clients=read_lines(run.clients),
                unscored=[],
                labels=data.label_counts(),
                names=data.client_names(),
                parameters=parameters,
                frozen_unchanged=runtime.model_sha256() == self._frozen,
                seconds=dict(upload.seconds) | {"total": sum(upload.seconds.values())},
            )
        )
        write_sealed(run.result, result)


@contextmanager
def _lock(run: RunDirectory) -> Iterator[None]:
    """Hold what the site writes, as soon as a worker has ended that was of a node that was killed."""
    deadline = time.monotonic() + LOCK_SECONDS
    while run.is_locked() and time.monotonic() < deadline:
        time.sleep(0.1)
    with run.lock():
        yield


def _seal_until(path: Path, last_round: int) -> Record:
    """Return the seal of a log's lines of rounds until ``last_round``, with which it begins."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return seal_of_log(b"".join(line for line in lines if json.loads(line)["round"] <= last_round))


def _shared(download: Download) -> ServerState:
    """Return the server's state as the site has received it."""
    sent = download.sent
    return ServerState(round_number=download.round_number, tensors=sent.tensors, beside=sent.beside)
