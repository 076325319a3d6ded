"""A client's side of the exchange: one resident model on which clients take turns."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

from fedexperts.algorithms.aggregation import current, load_tensors
from fedexperts.algorithms.api import Algorithm, Client, ModelParts
from fedexperts.data.batches import Batch, BatchCounts, draw_batches, encode_all, sequential_batches
from fedexperts.data.examples import Question
from fedexperts.data.federated import FederatedData
from fedexperts.data.prompts import Encoded, PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.settings import EvaluationSettings
from fedexperts.federation.personal import PersonalStore
from fedexperts.federation.scoring import Scorer
from fedexperts.messages import Download, Upload
from fedexperts.moe.surgery.graft import ungraft
from fedexperts.seeds import derive_random
from fedexperts.tensors import Tensors, sha256_of
from fedexperts.training.settings import TrainingSettings

_NUM_ENCODED_CLIENTS = 8


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """What every client of a run is told alike."""

    seed: int
    num_rounds: int
    config_sha256: str
    training: TrainingSettings
    evaluation: EvaluationSettings


@dataclass(kw_only=True)
class Watcher:
    """Who is told of progress inside a client's turn."""

    client_started: Callable[[str, int], None] = field(default=lambda client_id, num_steps: None)
    step_done: Callable[[float], None] = field(default=lambda loss: None)


class ClientRuntime:
    """Answers downloads for any client whose data it has.

    The model is loaded once. Before each turn it is as it was loaded, with LoRA at its start; what a client
    brings of its own is put in for the turn and taken out after it, so memory does not grow with the clients.
    """

    def __init__(
        self,
        parts: ModelParts,
        format: PromptFormat,
        data: FederatedData,
        algorithm: Algorithm,
        settings: RuntimeSettings,
        store: PersonalStore,
        questions: Sequence[Question] = (),
        watcher: Watcher | None = None,
    ) -> None:
        """``parts`` are those of a model with fresh LoRA; ``questions`` are the knowledge exam's, if any."""
        self.parts, self.format, self.data, self.algorithm = parts, format, data, algorithm
        self.settings, self.store = settings, store
        self.watcher = watcher or Watcher()
        self.scorer = Scorer(self, questions)
        self._start = current(parts.model, parts.lora_names)
        self._encoded = lru_cache(maxsize=_NUM_ENCODED_CLIENTS)(self._encode)

    def _encode(self, client_id: str) -> tuple[list[Encoded], BatchCounts]:
        encoded, counts = encode_all(self.format, self.data.examples(client_id, "train"))
        if not encoded:
            raise UserError(
                f"client {client_id}: none of its {counts.num_without_label} training examples has a label "
                "within data.max_tokens"
            )
        return encoded, counts

    def handle(self, client_id: str, download: Download) -> Upload:
        """Do what ``download`` asks for as ``client_id``; what goes wrong comes back as a failure.

        Faults of the program are raised; only what the client's data or numbers did is a failure.
        """
        if download.config_sha256 != self.settings.config_sha256:
            return Upload(failure="was started from another configuration than the server's")
        try:
            if download.task == "train":
                return self._train(client_id, download)
            return self.scorer.evaluate(client_id, download)
        except UserError as error:
            return Upload(failure=str(error))

    def _train(self, client_id: str, download: Download) -> Upload:
        started = time.perf_counter()
        personal = self.store.load(client_id, before_round=download.round)
        loaded = time.perf_counter()
        with self.turn(client_id, download.round) as client:
            upload, personal = self.algorithm.client_update(client, personal, download.tensors)
        trained = time.perf_counter()
        self.store.save(client_id, personal, round=download.round)
        upload.report["seconds"] = {
            "load": loaded - started,
            "train": trained - loaded,
            "save": time.perf_counter() - trained,
        }
        upload.report.update(self._counts(client_id))
        return upload

    def _counts(self, client_id: str) -> dict[str, int]:
        counts = self._encoded(client_id)[1]
        return {"num_truncated": counts.num_truncated, "num_without_label": counts.num_without_label}

    @contextmanager
    def turn(self, client_id: str, round: int) -> Iterator[Client]:
        """The model, clean, in the hands of one client; clean again afterwards, whatever happened."""
        self.clean()
        self.watcher.client_started(client_id, self.settings.training.num_local_steps)
        try:
            yield self._client(client_id, round, self.data.num_examples(client_id, "train"))
        finally:
            self.clean()

    @contextmanager
    def preview(self) -> Iterator[None]:
        """The model as any client has it, its personal tensors blank: to predict sizes without data."""
        self.clean()
        try:
            blank = self.algorithm.blank_personal(self.parts)
            self.algorithm.install(self._client("any", 1, 0), blank, {})
            yield
        finally:
            self.clean()

    def _client(self, client_id: str, round: int, num_train: int) -> Client:
        return Client(
            client_id=client_id,
            round=round,
            num_rounds=self.settings.num_rounds,
            seed=self.settings.seed,
            parts=self.parts,
            training=self.settings.training,
            num_train=num_train,
            draw_batches=lambda: self._draw(client_id, round),
            calibration_batches=lambda largest: self._calibration(client_id, largest),
            on_step=self.watcher.step_done,
        )

    def clean(self) -> None:
        """Take grafts out and put LoRA back to its start."""
        ungraft(self.parts.layers)
        load_tensors(self.parts.model, self._start)

    def _draw(self, client_id: str, round: int) -> list[Batch]:
        return draw_batches(
            self._encoded(client_id)[0],
            num_batches=self.settings.training.num_local_steps,
            batch_size=self.settings.training.batch_size,
            rng=derive_random(self.settings.seed, "batches", client_id, round),
            pad_token_id=self.format.pad_token_id,
        )

    def _calibration(self, client_id: str, largest: int) -> list[Batch]:
        encoded = self._encoded(client_id)[0]
        rng = derive_random(self.settings.seed, "calibration", client_id)
        drawn = rng.sample(encoded, min(largest, len(encoded)))
        size = self.settings.training.batch_size
        return list(sequential_batches(drawn, batch_size=size, pad_token_id=self.format.pad_token_id))

    def owned_by(self, client_id: str, personal: Tensors, tensors: Tensors) -> None:
        """Assert that the model now holds exactly these travelling and personal tensors, bit for bit."""
        expected = dict(tensors) | {
            name: personal[name] for name in self.algorithm.personal_names(self.parts) if name in personal
        }
        found = current(self.parts.model, expected)
        assert sha256_of(found) == sha256_of(expected), f"the model in place is not that of {client_id}"

    def adapted(self) -> Tensors:
        """All tensors, now in the model, that make it differ from the pretrained one."""
        names = dict.fromkeys(self.parts.lora_names)
        names |= dict.fromkeys(self.algorithm.upload_names(self.parts))
        names |= dict.fromkeys(self.algorithm.personal_names(self.parts))
        return current(self.parts.model, names)
