"""Take clients' turns on one resident model."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import cycle, islice
from typing import Literal

from fedexperts.algorithms.api import Algorithm, Client, ClientFacts, Kept, ModelParts
from fedexperts.algorithms.privacy import PrivacySettings
from fedexperts.costs.devices import Device
from fedexperts.costs.work import WorkMeter, as_figures, counting
from fedexperts.data.batches import Batch, BatchCounts, draw_batches, encode_all, sequential_batches
from fedexperts.data.federated import FederatedData
from fedexperts.data.prompts import Encoded, PromptFormat
from fedexperts.errors import UserError
from fedexperts.evaluation.settings import EvaluationSettings
from fedexperts.federation.calibration import first_texts, of_majority_label
from fedexperts.federation.clock import OVERLAPPED
from fedexperts.federation.personal import PersonalStore, refuse_non_finite
from fedexperts.messages import Download, Sent, Stamp, Upload
from fedexperts.moe.surgery.undo import UndoStack, undone
from fedexperts.process_memory import MemoryGuard
from fedexperts.seeds import derive_random
from fedexperts.tensors import num_bytes, sha256_of
from fedexperts.training.settings import TrainingSettings

_NUM_ENCODED_CLIENTS = 8


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """Settings that every client of a run shares."""

    seed: int
    num_rounds: int
    config_sha256: str
    training: TrainingSettings
    evaluation: EvaluationSettings
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Memory of each client's device; a client that is not named has no limit."""
    devices: Mapping[str, Device] = field(default_factory=dict)
    """Device of each client, for which the work of its turns is counted; empty without a clock."""
    keep_states: int = 1
    """Number of the server's last states that can be gone back to, for which clients keep their versions."""
    num_older: int = 1
    """Versions that clients keep of those as old as the oldest of these states, or older: two where an upload
    may count rounds after its turn began."""
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    """Clipping and noise of uploads."""


@dataclass(kw_only=True)
class Watcher:
    """Callbacks for progress inside a client's turn."""

    client_started: Callable[[str, int], None] = field(default=lambda client_id, num_steps: None)
    step_done: Callable[[float], None] = field(default=lambda loss: None)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The model in the hands of one client."""

    client: Client
    undo: UndoStack
    """Knows what has been written into the model, and undoes it at the end of the turn."""


class ClientRuntime:
    """Answers training downloads for any client whose data it has.

    The model is loaded once. Between turns it is as it was loaded, bit for bit, with LoRA at its start; all
    that a client brings is put in for its turn and undone after it, so memory does not grow with the clients.
    """

    def __init__(
        self,
        parts: ModelParts,
        format: PromptFormat,
        data: FederatedData,
        algorithm: Algorithm,
        settings: RuntimeSettings,
        store: PersonalStore,
        watcher: Watcher | None = None,
    ) -> None:
        """``parts`` are those of a model with fresh LoRA."""
        self.parts, self.format, self.data, self.algorithm = parts, format, data, algorithm
        self.settings, self.store = settings, store
        self.watcher = watcher or Watcher()
        self.evaluate: Callable[[str, Download], Upload] | None = None
        """Answers downloads that ask for scores; see :class:`fedexperts.federation.scoring.Scorer`."""
        self.hand_over: Callable[[Upload], None] | None = None
        """Delivers an upload while its turn goes on; None where a turn ends with its upload."""
        self.guard: MemoryGuard | None = None
        """Keeps each client's training within its memory, in a process that takes turns alone."""
        self.encoded = lru_cache(maxsize=_NUM_ENCODED_CLIENTS)(self._encode)
        """A client's training examples as token ids, and what encoding made of them."""

    def facts(self) -> tuple[ClientFacts, ...]:
        """Return all clients of the data."""
        return tuple(
            ClientFacts(
                client_id=client_id,
                num_train=self.data.num_examples(client_id, "train"),
                memory_bytes=self.settings.memory_bytes.get(client_id, 0),
            )
            for client_id in self.data.client_ids
        )

    def model_sha256(self) -> str:
        """Hash the whole resident model between turns: no client may leave a trace in it."""
        model = self.parts.model
        return sha256_of(dict(model.named_parameters()), dict(model.named_buffers()))

    def _encode(self, client_id: str) -> tuple[list[Encoded], BatchCounts]:
        encoded, counts = encode_all(self.format, self.data.examples(client_id, "train"))
        if not encoded:
            raise UserError(
                f"client {client_id}: none of its {counts.num_without_label} training examples has a label "
                "within data.max_tokens"
            )
        return encoded, counts

    def handle(self, client_id: str, download: Download) -> Upload:
        """Do what ``download`` asks for as ``client_id``; a mistake of the user's is returned as a failure.

        Faults of the program are raised; only what the client's data or numbers did is a failure.
        """
        return replace(self._answer(client_id, download), stamp=_stamp(client_id, download))

    def _answer(self, client_id: str, download: Download) -> Upload:
        if download.config_sha256 != self.settings.config_sha256:
            return Upload(failure="was started from another configuration than the server's")
        try:
            if download.task == "train":
                return self._train(client_id, download)
            if self.evaluate is not None:
                return self.evaluate(client_id, download)
            return Upload(failure=f"does not know the task {download.task!r}")
        except UserError as error:
            return Upload(failure=str(error))

    def _train(self, client_id: str, download: Download) -> Upload:
        started = time.perf_counter()
        stored = [self.store.load(client_id, download.kept_round)]
        loaded, meter = time.perf_counter(), WorkMeter() if self.settings.devices else None
        # A clock goes by work that the upload tells: with one, nothing is done after it.
        goes_on = self.hand_over is not None and meter is None and self.algorithm.goes_on(stored[0])
        with (
            self.turn(client_id, download.round_number, goes_on=goes_on) as turn,
            counting(meter),
            self._confined(client_id),
        ):
            _count_loading(meter, stored[0], download.sent)
            # Handed over by pop: what was loaded is freed as soon as the algorithm has installed it.
            upload, kept = self.algorithm.client_update(turn.client, stored.pop(), download.sent)
        trained = time.perf_counter()
        seconds = {
            **upload.seconds,
            "load": loaded - started,
            "train": trained - loaded - math.fsum(upload.seconds.values()),
        }
        counts = self.encoded(client_id)[1]
        metrics = upload.metrics | {
            "num_truncated": float(counts.num_truncated),
            "num_without_label": float(counts.num_without_label),
        }
        upload = replace(upload, metrics=metrics, seconds=seconds)
        if goes_on and self.hand_over:
            refuse_non_finite(kept)
            private = self._private(upload, client_id, download)
            self.hand_over(replace(private, stamp=_stamp(client_id, download)))
            del private
            del upload
            return self._go_on(client_id, download, kept)
        self._save(client_id, download, kept)
        work = self._work(client_id, meter, upload, kept) if meter else {}
        seconds["save"] = time.perf_counter() - trained
        return self._private(replace(upload, work=work), client_id, download)

    def _private(self, upload: Upload, client_id: str, download: Download) -> Upload:
        """Return what a client sends with differential privacy, if that is asked for."""
        privacy, came = self.settings.privacy, download.sent.tensors
        if not privacy.is_on:
            return upload
        if upload.tensors.keys() - came.keys():
            # Tensors that do not travel in the first round start as they are in every client's model.
            came = {**self.algorithm.init(self.parts, ()).tensors, **came}
        return privacy.private(upload, came, client_id, download.round_number)

    def _go_on(self, client_id: str, download: Download, kept: Kept) -> Upload:
        """Do what the upload need not wait for, and save; return what that took, or why it was impossible."""
        failure, seconds, started = "", dict[str, float](), time.perf_counter()
        try:
            before = self.store.load(client_id, download.kept_round)
            with self.turn(client_id, download.round_number) as turn, self._confined(client_id):
                made, seconds = self.algorithm.after_upload(turn.client, before, download.sent, kept)
            kept = made  # not before the memory that it took has been judged
        except UserError as error:
            failure = str(error)
        self._save(client_id, download, kept)
        seconds["save"] = time.perf_counter() - started - math.fsum(seconds.values())
        return Upload(failure=failure, seconds=seconds)

    def _confined(self, client_id: str) -> AbstractContextManager[None]:
        return self.guard.confined(client_id) if self.guard else nullcontext()

    def _save(self, client_id: str, download: Download, kept: Kept) -> None:
        self.store.save(
            client_id,
            kept,
            round_number=download.round_number,
            kept_round=download.kept_round,
            keep_states=self.settings.keep_states,
            num_older=self.settings.num_older,
        )

    def _work(self, client_id: str, meter: WorkMeter, upload: Upload, kept: Kept) -> dict[str, float]:
        """Return the counted work of a turn, with a phase named as the algorithm named its seconds."""
        meter.move("host", _bytes_kept(kept) + num_bytes(upload.tensors) + num_bytes(upload.beside), "save")
        meter.move("disk", _bytes_kept(kept), "save")
        found = meter.work(self.settings.devices[client_id])
        later = {name.removesuffix(OVERLAPPED): name for name in upload.seconds if name.endswith(OVERLAPPED)}
        return as_figures({later.get(phase, phase): own for phase, own in found.items()})

    @contextmanager
    def turn(
        self,
        client_id: str,
        round_number: int,
        purpose: Literal["train", "evaluate"] = "train",
        *,
        goes_on: bool = False,
    ) -> Iterator[Turn]:
        """Lend the model, as it was loaded, to one client; undo everything afterwards."""
        self.watcher.client_started(client_id, self.settings.training.num_local_steps)
        num_train = len(self.encoded(client_id)[0])
        with self.untouched() as undo:
            client = self._client(client_id, round_number, num_train, purpose)
            yield Turn(client=replace(client, goes_on=goes_on), undo=undo)

    @contextmanager
    def untouched(self) -> Iterator[UndoStack]:
        """Lend the model as it was loaded; undo everything afterwards, whatever happened."""
        with undone(self.parts.model, self.parts.layers, self.parts.originals) as undo:
            yield undo

    @contextmanager
    def installed(self, client_id: str, kept: Kept, sent: Sent) -> Iterator[UndoStack]:
        """Give the model as ``client_id`` has it before local steps; its data are not looked at."""
        with self.untouched() as undo:
            self.algorithm.install(self._client(client_id, 1, 1, "evaluate"), kept, sent)
            yield undo

    @contextmanager
    def preview(self, sent: Sent) -> Iterator[tuple[UndoStack, Kept]]:
        """Give the model on which any client takes its steps, and what it keeps, blank: to predict sizes."""
        client, blank = self._client("any", 1, 1, "evaluate"), self.algorithm.blank(self.parts)
        with self.untouched() as undo:
            kept = self.algorithm.install(client, blank, sent)
            self.algorithm.prepare_steps(client, kept, sent)
            yield undo, kept

    def _client(
        self, client_id: str, round_number: int, num_train: int, purpose: Literal["train", "evaluate"]
    ) -> Client:
        return Client(
            client_id=client_id,
            round_number=round_number,
            num_rounds=self.settings.num_rounds,
            seed=self.settings.seed,
            purpose=purpose,
            parts=self.parts,
            training=self.settings.training,
            num_train=num_train,
            memory_bytes=self.settings.memory_bytes.get(client_id, 0),
            draw_batches=lambda: self.draw(client_id, round_number),
            calibration_batches=partial(self._calibration, client_id),
            on_step=self.watcher.step_done,
        )

    def draw(self, client_id: str, round_number: int) -> list[Batch]:
        """Return a client's training batches of a round."""
        training = self.settings.training
        number = training.num_replayed
        return draw_batches(
            self.encoded(client_id)[0],
            num_batches=training.num_local_steps,
            batch_size=training.batch_size,
            rng=derive_random(self.settings.seed, "batches", client_id, round_number),
            pad_token_id=self.format.pad_token_id,
            beside=islice(cycle(self.replayed), (round_number - 1) * training.num_local_steps * number, None),
            num_beside=number,
        )

    @cached_property
    def replayed(self) -> list[Encoded]:
        """Texts that local steps replay (``training.replay``).

        Raises:
            UserError: their file is missing or damaged, or none has a label.
        """
        training, key = self.settings.training, "training.replay"
        if not training.replay:
            return []
        texts = first_texts(self.format, training.replay, training.replay_texts, key)
        usable = [one for one in texts if one.num_labels > 0]
        if not usable:
            raise UserError(f"{key}: none of its texts has a label within data.max_tokens")
        return usable

    def _calibration(
        self,
        client_id: str,
        largest: int,
        *,
        is_majority_label: bool = False,
        texts: str = "",
        key: str = "",
    ) -> list[Batch]:
        """See :class:`fedexperts.algorithms.api.CalibrationBatches`."""
        if texts:
            drawn = first_texts(self.format, texts, largest, key)
        else:
            encoded = self._encoded_majority(client_id) if is_majority_label else self.encoded(client_id)[0]
            rng = derive_random(self.settings.seed, "calibration", client_id)
            drawn = rng.sample(encoded, min(largest, len(encoded)))
        size = self.settings.training.batch_size
        return list(sequential_batches(drawn, batch_size=size, pad_token_id=self.format.pad_token_id))

    def _encoded_majority(self, client_id: str) -> list[Encoded]:
        examples = of_majority_label(self.data.examples(client_id, "train"))
        encoded, _ = encode_all(self.format, examples)
        if not encoded:
            raise UserError(
                f"client {client_id}: no training example of its most frequent label, {examples[0].label!r}, "
                "has a response within data.max_tokens"
            )
        return encoded


def _stamp(client_id: str, download: Download) -> Stamp:
    """Return what an answer repeats of the message that it answers."""
    return Stamp(run=download.run, round_number=download.round_number, client_id=client_id)


def _count_loading(meter: WorkMeter | None, kept: Kept, sent: Sent) -> None:
    """Count what is read from the client's disk, and what goes to the memory that holds the model."""
    if meter:
        came = num_bytes(sent.tensors) + num_bytes(sent.beside)
        meter.move("host", _bytes_kept(kept) + came, "load")
        meter.move("disk", _bytes_kept(kept), "load")


def _bytes_kept(kept: Kept) -> int:
    return num_bytes(kept.parameters) + num_bytes(kept.beside) + sum(map(num_bytes, kept.optimizer.values()))
