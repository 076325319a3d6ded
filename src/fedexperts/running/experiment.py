"""Run one experiment from its configuration to its result: rounds, evaluation, and files."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedexperts.algorithms.api import ModelParts, ServerState
from fedexperts.algorithms.privacy import PrivateRounds
from fedexperts.config.load import config_sha256, difference, load_config, resolved_toml, to_table
from fedexperts.config.schema import RunConfig
from fedexperts.costs.privacy import describe_privacy, privacy_of
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.evaluation.retention import RETENTION_SCORES
from fedexperts.federation.asynchronous import AsynchronousFederation
from fedexperts.federation.checkpoint import (
    Checkpoint,
    drop_unfinished_round,
    load_checkpoint,
    save_checkpoint,
    state_name,
)
from fedexperts.federation.clock import Clock
from fedexperts.federation.edge import evaluation_refusal
from fedexperts.federation.flower_launch import FlowerLink, run_with_flower
from fedexperts.federation.inprocess import InProcess
from fedexperts.federation.ledger import Ledger
from fedexperts.federation.rounds import Federation, RoundRecord, as_counts
from fedexperts.federation.runtime import ClientRuntime, Watcher
from fedexperts.federation.scoring import HASH, SUBJECTS, UNTOLD, Scorer, hash_of, metric_names, table_of
from fedexperts.federation.transport import ArrivingTransport, Transport
from fedexperts.federation.under_way import UploadFolder
from fedexperts.integrity import check_resumable, read_record
from fedexperts.messages import Upload
from fedexperts.models.held_experts import quantised_experts
from fedexperts.releases import Releases, read_releases, write_releases
from fedexperts.run_directory import RunDirectory, append_lines, read_lines, write_atomically
from fedexperts.running.environment import describe_environment
from fedexperts.running.privacy import privacy_of_run
from fedexperts.running.progress import Progress
from fedexperts.running.result import ResultParts, build_result, describe_parameters, mean_metrics
from fedexperts.running.workbench import Workbench, open_workbench, open_worker_pool, personal_store
from fedexperts.seals import read_sealed, write_sealed
from fedexperts.site_seals import refuse_site
from fedexperts.tensors import first_non_finite
from fedexperts.training.settings import learning_rate_share

logger = logging.getLogger(__name__)

TransportMaker = Callable[[ClientRuntime], Transport]

_SPENT = ("epsilon", "turns_of_a_client", "num_repeated_rounds")
"""Figures of ``[privacy]`` that grow from round to round."""


def run_experiment(
    config: RunConfig,
    run_directory: Path,
    *,
    progress: Progress,
    resume: bool = False,
) -> dict[str, Any]:
    """Run, or go on with, one experiment; returns ``result.json``'s object.

    A finished run that is resumed is not run again.

    Raises:
        UserError: something of the user's is wrong (see docs/configuration.md), or a client failed and
            ``cohort.on_failure`` is ``stop``. Finished rounds stay, and ``resume`` goes on from them.
    """
    run = RunDirectory(run_directory)
    if resume:
        refuse_site(run, "resume")
    with run.claim(resume=resume):
        return run_claimed(run, config, progress, resume=resume)


def run_claimed(
    run: RunDirectory, config: RunConfig, progress: Progress, *, resume: bool, link: FlowerLink | None = None
) -> dict[str, Any]:
    """Do as :func:`run_experiment` in a folder that the caller has claimed.

    ``link`` is a SuperLink of sites that is already up.
    """
    with run.lock():
        if resume:
            if run.result.exists():
                refuse_other_config(run, config)
                return read_sealed(run.result)
            check_resumable(run)
            refuse_other_config(run, config)
        else:
            write_atomically(run.config, resolved_toml(config).encode())
        if config.transport.name == "inprocess":
            return _run(config, run, progress)
    # Over Flower the server app writes the run, and takes the lock itself.
    return run_with_flower(config, run, progress=progress, link=link)


def refuse_other_config(run: RunDirectory, config: RunConfig) -> None:
    """Raise UserError, with the difference, if ``run`` was started from another configuration."""
    changes = difference(load_config(run.config), config)
    if changes:
        raise UserError(
            f"cannot resume {run.path}: it was started with another configuration ({'; '.join(changes)})"
        )


def _run(config: RunConfig, run: RunDirectory, progress: Progress) -> dict[str, Any]:
    stopwatch = Stopwatch()
    progress.phase("loading data and model")
    with open_workbench(config, stopwatch) as bench:
        watcher = Watcher(client_started=progress.client_started, step_done=progress.step_done)
        scorer = bench.scorer(personal_store(run.path), watcher)
        write_sealed(run.environment, environment_of(bench))
        if config.transport.workers == 1 and config.transport.clients == "resident":
            return ServerRun(config, run, scorer, InProcess(scorer.runtime), progress, stopwatch).run()
        with open_worker_pool(bench, run.path, scorer.runtime.facts()) as pool:
            with stopwatch.phase("workers"):
                progress.phase(f"starting {pool.num_workers} workers")
                for done, _ in enumerate(pool.start(), start=1):
                    progress.advance_phase(done, pool.num_workers)
            return ServerRun(config, run, scorer, pool, progress, stopwatch, pool.model_hashes).run()


def device_of(parts: ModelParts) -> torch.device:
    """Return the device of the model."""
    return next(parts.model.parameters()).device


def environment_of(bench: Workbench) -> dict[str, Any]:
    """Return the record of the machine, and of experts in few bits."""
    parts = bench.parts
    return describe_environment(bench.config.threads, str(device_of(parts)), quantised_experts(parts.model))


@dataclass
class ServerRun:
    """The server's side of one run, over any transport."""

    config: RunConfig
    directory: RunDirectory
    scorer: Scorer
    """On the server it gives the model and the exam; in process it also evaluates every client."""
    transport: Transport
    progress: Progress
    stopwatch: Stopwatch
    other_models: Callable[[], Sequence[str]] = tuple
    """Returns the hashes of the models on which clients take turns in other processes of this machine."""
    unscored: list[dict[str, Any]] = field(default_factory=list)
    """Failures of evaluations; those of rounds are in rounds.jsonl."""

    def run(self) -> dict[str, Any]:
        """Run all rounds that are left, evaluate, and write the result."""
        frozen = self.scorer.runtime.model_sha256()
        federation = self._federation()
        self._tell_privacy()
        reached = self._start(federation)
        self._set_clock(federation.clock)
        with self.stopwatch.phase("rounds"):
            reached = federation.run(
                reached,
                before_round=self._before_round,
                after_client=self.progress.client_done,
                after_round=self._after_round(federation),
            )
        with self.stopwatch.phase("evaluation"):
            scores = self._evaluate(federation, reached, "evaluate_fully")
            exam_global, retention_global = self._ask_server_model(reached.state)
        frozen_same = {self.scorer.runtime.model_sha256(), *self.other_models()} == {frozen}
        if not frozen_same:
            logger.error("the pretrained model changed during the run: its figures are void")
        result = build_result(
            ResultParts(
                name=self.directory.path.name,
                config=to_table(self.config),
                state=reached.state,
                scores=scores,
                base=read_sealed(self.directory.base),
                subjects=self.scorer.subjects,
                exam_global=exam_global,
                retention_global=retention_global,
                rounds=read_lines(self.directory.rounds),
                clients=read_lines(self.directory.clients),
                unscored=self.unscored,
                labels=self.scorer.runtime.data.label_counts(),
                names=self.scorer.runtime.data.client_names(),
                parameters=self._parameters(reached.state),
                frozen_unchanged=frozen_same,
                seconds=self._seconds(),
                clock=federation.clock,
                privacy=self._released(),
            )
        )
        write_sealed(self.directory.result, result)
        return result

    def _parameters(self, state: ServerState) -> dict[str, int]:
        """Parameters of the model as the first client has it."""
        runtime, client_id = self.scorer.runtime, state.clients[0].client_id
        sent = self.config.algorithm.download(state, client_id)
        expected = self.config.algorithm.expected(runtime.parts, state, client_id)
        with runtime.preview(sent):
            return describe_parameters(self.config.algorithm, runtime.parts, sent, expected)

    def _start(self, federation: Federation) -> Checkpoint:
        """Return the state to go on from; at the very beginning also score the pretrained model."""
        reached = load_checkpoint(self.directory)
        if reached is None:
            state = self.config.algorithm.init(self.scorer.runtime.parts, self.transport.clients)
            bad = first_non_finite({**state.tensors, **state.beside})
            if bad is not None:
                raise UserError(f"the algorithm starts with a tensor {bad!r} that is not finite")
            state = replace(state, seed=self.config.seed, num_rounds=self.config.rounds)
            reached = Checkpoint(state=state)
            with self.stopwatch.phase("evaluation"):
                self._score_base(federation, reached)
            if self.config.privacy.is_on:
                write_releases(self.directory.releases, Releases())
            self._save(reached)
        drop_unfinished_round(self.directory)
        config = self.config
        number = config.cohort.size or len(self.transport.clients)
        private = PrivateRounds(settings=config.privacy, cohort_size=number) if config.privacy.is_on else None
        state = replace(reached.state, aggregation=config.aggregation, private=private)
        reached = replace(reached, state=state)
        self.progress.start(self.config.rounds, reached.state.round_number + 1)
        return reached

    def _tell_privacy(self) -> None:
        """Tell the run's privacy after all its rounds, with ``[privacy]``.

        Raises:
            UserError: there is nothing to protect, or the journal of releases is missing or damaged.
        """
        if not self.config.privacy.is_on:
            return
        clients, parts = self.transport.clients, self.scorer.runtime.parts
        state = self.config.algorithm.init(parts, clients)
        ids = [facts.client_id for facts in clients]
        expected = self.config.algorithm.expected(parts, state, ids[0])
        if self.directory.checkpoint.exists():
            reached = read_record(self.directory.checkpoint)["round"]
            released = read_releases(self.directory.releases)
            privacy = privacy_of_run(self.config, ids, expected, released=released, reached=reached)
        else:
            privacy = privacy_of_run(self.config, ids, expected)
        self.progress.message(describe_privacy(privacy))

    def _released(self) -> dict[str, Any] | None:
        """Return the privacy after all that clients were asked until now; None without ``[privacy]``."""
        if not self.config.privacy.is_on:
            return None
        released = read_releases(self.directory.releases)
        return privacy_of(self.config.privacy, released.turns, released.num_repeated_rounds)

    def _save(self, reached: Checkpoint) -> None:
        save_checkpoint(self.directory, reached, keep_states=self.config.keep_states)

    def _score_base(self, federation: Federation, reached: Checkpoint) -> None:
        """Score the pretrained model, before the first round and never again."""
        exam, retention = self.scorer.exam(), self.scorer.retention()
        clients = self._evaluate(federation, reached, "evaluate_base")
        write_sealed(self.directory.base, {"exam": exam, "retention": retention, "clients": clients})

    def _federation(self) -> Federation:
        config, parts = self.config, self.scorer.runtime.parts
        is_measured = config.transport.clients == "process"
        make: Callable[..., Federation] = Federation
        if config.asynchronous:
            config.asynchronous.refuse_too_few(len(self.transport.clients))
            make = partial(
                AsynchronousFederation,
                asynchronous=config.asynchronous,
                folder=UploadFolder(path=self.directory.under_way),
                states=lambda round_number: self.directory.state / state_name(round_number),
                arriving=self.transport if isinstance(self.transport, ArrivingTransport) else None,
            )
        return make(
            algorithm=config.algorithm,
            parts=parts,
            memory_plan=config.algorithm.memory_plan(parts) if is_measured else None,
            transport=self.transport,
            cohort=config.cohort,
            num_rounds=config.rounds,
            seed=config.seed,
            config_sha256=config_sha256(config),
            run_name=self.directory.name_on_nodes(),
            round_seconds=config.transport.round_seconds,
            waits_by_clock=config.transport.name == "inprocess",
            spool_folder=self.directory.path,
            lr_of_round=lambda round_number: (
                config.training.lr * learning_rate_share(round_number, config.rounds, config.training)
            ),
            clock=self._clock(),
            of_sites=self._is_of_sites,
            is_private=config.privacy.is_on,
        )

    @property
    def _is_of_sites(self) -> bool:
        return self.config.data.partition.kind == "site"

    def _clock(self) -> Clock | None:
        """Return the simulated clock at its start."""
        if self.config.clock is None:
            return None
        clients = [facts.client_id for facts in self.transport.clients]
        return Clock(settings=self.config.clock, client_ids=clients, seed=self.config.seed)

    def _set_clock(self, clock: Clock | None) -> None:
        """Set the clock to the end of the last round that counts."""
        lines = read_lines(self.directory.rounds)
        if clock and lines:
            clock.now = lines[-1]["simulated"]["end"]

    def _before_round(self, round_number: int, cohort: Sequence[str], num_uploads: int) -> None:
        """Count the round's releases before anybody is asked: a crash later cannot undo them."""
        if self.config.privacy.is_on:
            released = read_releases(self.directory.releases).with_round(round_number, cohort)
            write_releases(self.directory.releases, released)
        self.progress.round_started(round_number, num_uploads)

    def _after_round(self, federation: Federation) -> Callable[[Checkpoint, RoundRecord], None]:
        def after_round(reached: Checkpoint, record: RoundRecord) -> None:
            line, every = record.line(reached.state), self.config.evaluation.every
            if privacy := self._released():
                line["privacy"] = {name: privacy[name] for name in _SPENT}
            if every and record.round_number % every == 0 and record.round_number < self.config.rounds:
                line["evaluation"] = self._interim(federation, reached)
            append_lines(self.directory.clients, record.clients)
            append_lines(self.directory.rounds, [line])
            self._save(reached)
            self.progress.round_finished(record.round_number, line)

        return after_round

    def _interim(self, federation: Federation, reached: Checkpoint) -> dict[str, Any]:
        with self.stopwatch.phase("evaluation"):
            scores = self._evaluate(federation, reached, "evaluate")
            exam, retention = self._ask_server_model(reached.state)
        means = mean_metrics([client["algorithm"] | client["metrics"] for client in scores.values()])
        asked = {f"{name}_global": retention[name] for name in RETENTION_SCORES if name in retention}
        return means | ({"exam_global": exam["accuracy"]} if exam else {}) | asked

    def _evaluate(self, federation: Federation, reached: Checkpoint, task: str) -> dict[str, dict[str, Any]]:
        """Return every client's scores, not the cohort's alone, by client."""
        state = reached.state
        clients = [facts.client_id for facts in state.clients]
        state = self.config.algorithm.plan_round(state, clients, state.round_number + 1)
        expected, names = self.scorer.expected(task), metric_names()
        optional = UNTOLD if self._is_of_sites else ()
        ledger = Ledger(run=federation.run_name, round_number=state.round_number + 1)
        scores = {}
        self.progress.phase(f"evaluating {len(clients)} clients")
        downloads = federation.downloads(state, reached, clients, state.round_number + 1, task)
        for done, delivery in enumerate(self.transport.exchange(downloads), start=1):
            stale = "" if delivery.upload.failure else ledger.fence(delivery)[1]
            reason = stale or evaluation_refusal(delivery.upload, expected, names, optional=optional)
            if reason:
                self._miss(delivery.client_id, state.round_number, reason)
            else:
                scores[delivery.client_id] = client_scores(delivery.upload)
            self.progress.advance_phase(done, len(clients))
        if not scores:
            raise UserError(f"no client could be evaluated after round {state.round_number}")
        return scores

    def _miss(self, client_id: str, round_number: int, reason: str) -> None:
        """Leave a client without scores out of the means, by name; or stop the run."""
        if self.config.cohort.on_failure == "stop":
            raise UserError(f"evaluating client {client_id} after round {round_number}: {reason}")
        logger.warning("client %s has no scores after round %d: %s", client_id, round_number, reason)
        self.unscored.append(
            {"round": round_number, "client": client_id, "reason": f"not evaluated: {reason}"}
        )

    def _ask_server_model(self, state: ServerState) -> tuple[dict[str, Any], dict[str, float]]:
        """Return exam and retention of the server's model: what travels, and nothing personal."""
        with self.scorer.shared_model(self.config.algorithm.server_model(state)):
            return self.scorer.exam(), self.scorer.retention()

    def _seconds(self) -> dict[str, float]:
        """Return wall-clock seconds of this process by phase; a resumed run's rounds come from the log."""
        measured = dict(self.stopwatch.seconds)
        rounds = measured.pop("rounds", 0.0)
        lines = read_lines(self.directory.rounds)
        for line in lines:
            for phase, seconds in line["seconds"].items():
                if phase != "total":
                    measured[phase] = measured.get(phase, 0.0) + seconds
        return measured | {"rounds": rounds, "total": self.stopwatch.total()}


def client_scores(upload: Upload) -> dict[str, Any]:
    """Return what base.json and result.json keep of one client's evaluation."""
    matrix = {name: tensor.tolist() for name, tensor in upload.beside.items() if name.startswith("matrix_")}
    own = {**upload.measured, **{name: table.tolist() for name, table in upload.tables.items()}}
    scores: dict[str, Any] = {"metrics": as_counts(upload.metrics), "algorithm": own, "matrix": matrix}
    scores["exam_by_subject"] = upload.beside[SUBJECTS].tolist() if SUBJECTS in upload.beside else []
    scores["routing"] = {n: table_of(t) for n, t in upload.beside.items() if n.startswith("routing_")}
    return scores | ({"personal_sha256": hash_of(upload.beside)} if HASH in upload.beside else {})
