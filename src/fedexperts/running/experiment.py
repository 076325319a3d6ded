"""One run from its configuration to its result: rounds, evaluation, and what is written down."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedexperts.algorithms.aggregation import load_tensors
from fedexperts.algorithms.api import ModelParts, ServerState
from fedexperts.config.load import config_sha256, difference, load_config, resolved_toml, to_table
from fedexperts.config.schema import RunConfig
from fedexperts.costs.round import predict_round
from fedexperts.costs.stopwatch import Stopwatch
from fedexperts.errors import UserError
from fedexperts.federation.checkpoint import drop_unfinished_round, load_checkpoint, save_checkpoint
from fedexperts.federation.flower_launch import run_with_flower
from fedexperts.federation.inprocess import InProcess
from fedexperts.federation.rounds import Federation, RoundRecord
from fedexperts.federation.runtime import ClientRuntime, Watcher
from fedexperts.federation.transport import Transport
from fedexperts.moe.surgery.seam import fused_names
from fedexperts.run_directory import (
    RunDirectory,
    append_lines,
    read_json,
    read_lines,
    write_atomically,
    write_json,
)
from fedexperts.running.environment import describe_environment
from fedexperts.running.progress import Progress
from fedexperts.running.result import ResultParts, build_result, describe_parameters, mean_metrics
from fedexperts.running.workbench import open_workbench, personal_store
from fedexperts.training.local_steps import learning_rate_share

logger = logging.getLogger(__name__)

TransportMaker = Callable[[ClientRuntime], Transport]


def run_experiment(
    config: RunConfig, run_directory: Path, *, progress: Progress, resume: bool = False
) -> dict[str, Any]:
    """Run, or go on with, one experiment; returns ``result.json``'s object.

    A finished run that is resumed is not run again.

    Raises:
        UserError: something of the user's is wrong (see docs/configuration.md), or a client failed and
            ``cohort.on_failure`` is ``stop``. Finished rounds stay, and ``resume`` goes on from them.
    """
    run = RunDirectory(run_directory)
    with run.claim(resume=resume):
        return _run_in(run, config, progress, resume=resume)


def _run_in(run: RunDirectory, config: RunConfig, progress: Progress, *, resume: bool) -> dict[str, Any]:
    with run.lock():
        if resume:
            refuse_other_config(run, config)
            if run.result.exists():
                return read_json(run.result)
        else:
            write_atomically(run.config, resolved_toml(config).encode())
        if config.transport.name == "inprocess":
            return _run(config, run, progress)
    # Over Flower the server app writes the run, and takes the lock itself.
    return run_with_flower(config, run, progress=progress)


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
        runtime = bench.runtime(personal_store(run.path), watcher)
        write_json(run.environment, describe_environment(config.threads, str(device_of(bench.parts))))
        return ServerRun(config, run, runtime, InProcess(runtime), progress, stopwatch).run()


def device_of(parts: ModelParts) -> torch.device:
    """Where the model lives."""
    return next(parts.model.parameters()).device


@dataclass
class ServerRun:
    """The server's side of one run, over any transport."""

    config: RunConfig
    directory: RunDirectory
    runtime: ClientRuntime
    """On the server it gives the model and the exam; in process it is also every client's."""
    transport: Transport
    progress: Progress
    stopwatch: Stopwatch
    unscored: list[dict[str, Any]] = field(default_factory=list)
    """Failures of evaluations; those of rounds are in rounds.jsonl."""

    def run(self) -> dict[str, Any]:
        """All rounds that are left, the evaluation, and the result."""
        checksum = frozen_checksum(self.runtime.parts, self.config)
        state = self._start()
        federation = self._federation(state)
        with self.stopwatch.phase("rounds"):
            state = federation.run(
                state,
                before_round=self._before_round,
                after_client=self.progress.client_done,
                after_round=self._after_round(federation),
            )
        with self.stopwatch.phase("evaluation"):
            scores = self._evaluate(federation, state, "evaluate_fully")
            exam_global = self._global_exam(state)
        with self.runtime.preview():
            parameters = describe_parameters(self.config.algorithm, self.runtime.parts)
        frozen_same = frozen_checksum(self.runtime.parts, self.config) == checksum
        if not frozen_same:
            logger.error("frozen parameters of the base model changed during the run: its figures are void")
        result = build_result(
            ResultParts(
                name=self.directory.path.name,
                config=to_table(self.config),
                state=state,
                scores=scores,
                base=read_json(self.directory.base),
                exam_global=exam_global,
                rounds=read_lines(self.directory.rounds),
                clients=read_lines(self.directory.clients),
                unscored=self.unscored,
                labels=self.runtime.data.label_counts(),
                names=self.runtime.data.client_names(),
                parameters=parameters,
                frozen_unchanged=frozen_same,
                seconds=self._seconds(),
            )
        )
        write_json(self.directory.result, result)
        return result

    def _start(self) -> ServerState:
        """The state to go on from; at the very beginning also the figures of the untouched model."""
        state = load_checkpoint(self.directory)
        if state is None:
            self.runtime.clean()
            state = self.config.algorithm.init(self.runtime.parts)
            with self.stopwatch.phase("evaluation"):
                self._score_base(state)
            save_checkpoint(self.directory, state)
        drop_unfinished_round(self.directory, state.round)
        self.runtime.store.forget_after(state.round)
        self.progress.start(self.config.rounds, state.round + 1)
        return state

    def _score_base(self, state: ServerState) -> None:
        """Figures of the untouched model, before the first round and never again."""
        exam = self.runtime.scorer.exam()
        clients = self._evaluate(self._federation(state), state, "evaluate_base")
        write_json(self.directory.base, {"exam": exam, "clients": clients})

    def _federation(self, state: ServerState) -> Federation:
        config = self.config
        return Federation(
            algorithm=config.algorithm,
            transport=self.transport,
            cohort=config.cohort,
            num_rounds=config.rounds,
            seed=config.seed,
            config_sha256=config_sha256(config),
            predicted_bytes=predict_round(config.algorithm, state, self.runtime.parts),
            lr_of_round=lambda round: (
                config.training.lr * learning_rate_share(round, config.rounds, config.training)
            ),
        )

    def _before_round(self, round: int, cohort: Sequence[str]) -> None:
        self.progress.round_started(round, len(cohort))

    def _after_round(self, federation: Federation) -> Callable[[ServerState, RoundRecord], None]:
        def after_round(state: ServerState, record: RoundRecord) -> None:
            line = record.line(state)
            every = self.config.evaluation.every
            if every and state.round % every == 0 and state.round < self.config.rounds:
                line["evaluation"] = self._interim(federation, state)
            append_lines(self.directory.clients, record.clients)
            append_lines(self.directory.rounds, [line])
            save_checkpoint(self.directory, state)
            self.progress.round_finished(record.round, line)

        return after_round

    def _interim(self, federation: Federation, state: ServerState) -> dict[str, Any]:
        with self.stopwatch.phase("evaluation"):
            scores = self._evaluate(federation, state, "evaluate")
            exam = self._global_exam(state)
        means = mean_metrics([client["metrics"] for client in scores.values()])
        return means | ({"exam_global": exam["accuracy"]} if exam else {})

    def _evaluate(self, federation: Federation, state: ServerState, task: str) -> dict[str, dict[str, Any]]:
        """Every client's scores, not the cohort's alone, by client."""
        scores = {}
        clients = self.transport.client_ids
        self.progress.phase(f"evaluating {len(clients)} clients")
        downloads = federation.downloads(state, clients, state.round + 1, task)
        for done, delivery in enumerate(self.transport.exchange(downloads), start=1):
            if delivery.upload.failure:
                self._miss(delivery.client_id, state.round, delivery.upload.failure)
            else:
                metrics, report = delivery.upload.metrics, delivery.upload.report
                scores[delivery.client_id] = {"metrics": metrics, "report": report}
            self.progress.advance_phase(done, len(clients))
        if not scores:
            raise UserError(f"no client could be evaluated after round {state.round}")
        return scores

    def _miss(self, client_id: str, round: int, reason: str) -> None:
        """A client without scores is left out of the means, and named; or it stops the run."""
        if self.config.cohort.on_failure == "stop":
            raise UserError(f"evaluating client {client_id} after round {round}: {reason}")
        logger.warning("client %s has no scores after round %d: %s", client_id, round, reason)
        self.unscored.append({"round": round, "client": client_id, "reason": f"not evaluated: {reason}"})

    def _global_exam(self, state: ServerState) -> dict[str, Any]:
        """The exam of the server's model: what travels, and nothing personal."""
        self.runtime.clean()
        load_tensors(self.runtime.parts.model, state.tensors)
        exam = self.runtime.scorer.exam()
        self.runtime.clean()
        return exam

    def _seconds(self) -> dict[str, float]:
        """Wall-clock seconds of this process by phase; a resumed run counts its rounds from the log."""
        measured = dict(self.stopwatch.seconds)
        rounds = measured.pop("rounds", 0.0)
        lines = read_lines(self.directory.rounds)
        for line in lines:
            for phase, seconds in line["seconds"].items():
                if phase != "total":
                    measured[phase] = measured.get(phase, 0.0) + seconds
        return measured | {"rounds": rounds, "total": self.stopwatch.total()}


def frozen_checksum(parts: ModelParts, config: RunConfig) -> int:
    """A sum over the bits of every parameter that no client may change; any single change shows."""
    free = set(parts.lora_names) | fused_names(config.algorithm.upload_names(parts))
    total = 0
    for name, parameter in parts.model.named_parameters():
        if name not in free:
            bits = parameter.detach().reshape(-1).view(torch.uint8)
            total = (total * 31 + int(bits.sum(dtype=torch.int64))) % (1 << 61)
    return total
