"""Keep, in a site's own folder, what the site needs to use and judge its model without the server.

It is a run directory of one client: the configuration, what the server last sent, the site's own lines and
scores, and at the end a ``result.json``. Nothing in it comes from other clients but the shared tensors.
"""

import json
from pathlib import Path

from fedexperts.algorithms.api import ServerState
from fedexperts.config.load import resolved_toml, to_table
from fedexperts.config.schema import RunConfig
from fedexperts.costs.traffic import PredictedBytes
from fedexperts.federation.rounds import RoundRecord, client_line
from fedexperts.federation.scoring import Scorer
from fedexperts.federation.transport import Delivery
from fedexperts.messages import (
    Download,
    Expected,
    Upload,
    encode_upload,
    predict_download_bytes,
    predict_upload_bytes,
)
from fedexperts.run_directory import (
    RunDirectory,
    append_lines,
    read_lines,
    write_atomically,
)
from fedexperts.running.environment import describe_environment
from fedexperts.running.experiment import client_scores, device_of
from fedexperts.running.result import ResultParts, build_result, describe_parameters
from fedexperts.seals import read_sealed, write_sealed


class SiteRecord:
    """Writes one run of one site."""

    def __init__(self, run: RunDirectory, config: RunConfig, name: str, scorer: Scorer) -> None:
        """Write the configuration, with which the folder opens as a run."""
        self._run, self._config, self._name, self._scorer = run, config, name, scorer
        self._frozen = ""
        write_atomically(run.config, resolved_toml(config).encode())

    def received(self, download: Download, blob: bytes) -> None:
        """Keep what the server sent last, before the turn that it asks for."""
        write_atomically(self._run.received(self._name), blob, is_private=True)
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

    def _add_round(self, download: Download, upload: Upload, download_bytes: int) -> None:
        number, run = download.round_number, self._run
        for path in (run.rounds, run.clients):
            _keep_lines_until(path, number - 1)
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


def _keep_lines_until(path: Path, last_round: int) -> None:
    """Drop the records of rounds after ``last_round``, which were sent again after a crash."""
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in read_lines(path) if record["round"] <= last_round]
        write_atomically(path, "".join(kept).encode())


def _shared(download: Download) -> ServerState:
    """Return the server's state as the site has received it."""
    sent = download.sent
    return ServerState(round_number=download.round_number, tensors=sent.tensors, beside=sent.beside)
