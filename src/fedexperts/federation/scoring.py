"""Score a client's own models, where its data is."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fedexperts.data.batches import Batch, encode_all, sequential_batches
from fedexperts.data.examples import Example, Question
from fedexperts.data.split import SPLITS, Split
from fedexperts.evaluation.examples import Prediction, answer_examples, evaluate_examples, predictions
from fedexperts.evaluation.loss import mean_loss
from fedexperts.evaluation.multiple_choice import score_exam
from fedexperts.evaluation.own_metrics import own_scores
from fedexperts.evaluation.retention import (
    RETENTION_SCORES,
    RetentionProbe,
    answer_probe,
    retention_scores,
)
from fedexperts.evaluation.rouge import mean_rouge_l
from fedexperts.federation.personal import kept_sha256
from fedexperts.federation.runtime import ClientRuntime
from fedexperts.federation.snapshot import snapshot_bytes, take_snapshot
from fedexperts.messages import Download, Sent, Upload
from fedexperts.models.prompts import prompts_are
from fedexperts.moe.observing.profile import count_tokens
from fedexperts.moe.surgery import seam
from fedexperts.moe.surgery.undo import first_difference
from fedexperts.run_directory import as_json, read_json
from fedexperts.tensors import Tensors

logger = logging.getLogger(__name__)

ADAPTED = "adapted.safetensors"
"""File of a client's model after the local steps of the last evaluation."""

PREDICTIONS = "predictions.json"
"""File of some of a client's own model's answers, which never leave its machine."""

SCORES = ("loss", "perplexity", "rougeL", "exact_match")
FACETS = ("own_facts", "shared_facts", "style")
"""Scores that only examples about common knowledge have."""
TASKS = ("evaluate", "evaluate_fully", "evaluate_base")
HASH = "personal_sha256"
"""Beside an evaluation's metrics: SHA-256 of what the client keeps, uint8 (32,); zeros for nothing."""
ROUTINGS = {"evaluate_base": ("routing_base",), "evaluate_fully": ("routing_global", "routing_personalised")}
"""Beside the metrics of a task: tokens per expert, int64 (L, E); -1 where a layer has fewer experts."""
ROUTING_NAMES = tuple(name for names in ROUTINGS.values() for name in names)
SUBJECTS = "exam_by_subject"
"""Beside a full evaluation: exam accuracy by subject, float64, in the order of :attr:`Scorer.subjects`."""
UNTOLD = frozenset({*ROUTING_NAMES, SUBJECTS})
"""Parts of an evaluation that a site may leave out."""
_MISSING = -1.0
"""In the matrix: the other client has no test example with a label. By subject: no question fits."""
_COUNTS = (
    "num_test",
    "num_test_truncated",
    "num_test_without_label",
    "num_prompts_cut",
    "num_test_trained_elsewhere",
    *(f"num_{split}" for split in SPLITS),
)


def metric_names() -> frozenset[str]:
    """Return all names that an evaluation's metrics may have."""
    prefixes = {"test": "", "validation": "validation_"}
    scores = (
        f"{prefix}{score}_{when}"
        for prefix in prefixes.values()
        for score in (*SCORES, *FACETS)
        for when in _WHEN
    )
    retention = (f"{score}_{when}" for score in RETENTION_SCORES for when in ("before", "after"))
    return frozenset({*scores, *retention, *_COUNTS, "exam_personalised"})


_WHEN = ("base", "before", "after")


class Scorer:
    """Scores a client's model before and after local steps on the client's own test split.

    *Before* is what the server sent plus what the client keeps. *After* is the same model after one more turn
    of local steps, whose upload is thrown away and of which nothing is kept.
    """

    def __init__(
        self, runtime: ClientRuntime, questions: Sequence[Question], probe: RetentionProbe | None = None
    ) -> None:
        """Answer the runtime's evaluations; without ``questions`` there is no knowledge exam."""
        self.runtime, self._questions, self._probe = runtime, questions, probe or RetentionProbe()
        runtime.evaluate = self.evaluate

    def expected(self, task: str) -> Tensors:
        """Return shapes and dtypes of what must stand beside a task's metrics."""
        layers = self.runtime.parts.layers
        experts = max(layer.num_experts for layer in layers)
        due = {name: torch.empty(len(layers), experts, dtype=torch.int64) for name in ROUTINGS.get(task, ())}
        if task != "evaluate_base":
            due[HASH] = torch.empty(32, dtype=torch.uint8)
        if task == "evaluate_fully":
            due |= {
                f"matrix_{score}": torch.empty(len(self.runtime.data.client_ids), dtype=torch.float64)
                for score in self._matrix_scores()
            }
            due |= {SUBJECTS: torch.empty(len(self.subjects), dtype=torch.float64)} if self.subjects else {}
        return due

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subjects of the exam that clients' own models take; none without one."""
        if not self.runtime.settings.evaluation.exam.personalised:
            return ()
        return tuple(sorted({question.subject for question in self._questions}))

    def _matrix_scores(self) -> tuple[str, ...]:
        """Scores of the matrix of models by test splits, which only a process with all the data has."""
        settings = self.runtime.settings.evaluation
        number = len(self.runtime.data.client_ids)
        is_wanted = settings.matrix and 1 < number <= settings.matrix_clients
        return tuple(score for score in ("loss", "rougeL") if is_wanted and score in settings.metrics)

    def evaluate(self, client_id: str, download: Download) -> Upload:
        """Return scores as ``metrics``; with task ``evaluate_fully`` also matrix row, routing and exam."""
        if download.task not in TASKS:
            return Upload(failure=f"does not know the task {download.task!r}")
        if download.task == "evaluate_base":
            return self._evaluate_base(client_id)
        runtime, fully = self.runtime, download.task == "evaluate_fully"
        started = time.perf_counter()
        kept = runtime.store.load(client_id, download.kept_round)
        beside: Tensors = {HASH: _bytes_of(kept_sha256(kept))}
        if fully:
            with self.shared_model(runtime.algorithm.server_view(kept, download.sent)):
                beside["routing_global"] = self._routing(client_id)
        with runtime.turn(client_id, download.round_number, "evaluate") as turn:
            installed = runtime.algorithm.install(turn.client, kept, download.sent)
            self._check_model(client_id, runtime.algorithm.holds(installed, download.sent))
            metrics = self._scores(client_id, "test", "before")
            metrics |= self._own_retention(client_id, "before") if fully else {}
            measured = self._own_scores(client_id, "before")
        with runtime.turn(client_id, download.round_number, "evaluate") as turn:
            _, kept_after = runtime.algorithm.client_update(turn.client, kept, download.sent)
            self._check_model(client_id, kept_after.parameters)
            metrics |= self._scores(client_id, "test", "after", keep_predictions=fully)
            metrics |= self._scores(client_id, "validation", "after")
            measured |= self._own_scores(client_id, "after")
            if fully:
                beside |= self._full_report(client_id, metrics)
                snapshot = take_snapshot(runtime.parts, turn.undo.written)
                runtime.store.files(client_id).write(ADAPTED, snapshot_bytes(snapshot))
        sizes = {f"num_{split}": float(runtime.data.num_examples(client_id, split)) for split in SPLITS}
        elsewhere = runtime.data.client(client_id).num_test_trained_elsewhere
        sizes["num_test_trained_elsewhere"] = float(elsewhere)
        return Upload(
            metrics=metrics | sizes,
            measured=measured,
            beside=beside,
            tables=runtime.algorithm.describe(kept),
            seconds={"evaluate": time.perf_counter() - started},
        )

    def _check_model(self, client_id: str, expected: Mapping[str, Tensor]) -> None:
        """Raise RuntimeError unless the model now holds ``expected``, bit for bit."""
        found = seam.current(self.runtime.parts.model, expected)
        name = first_difference(found, expected)
        if name is not None:
            raise RuntimeError(f"the model in place is not that of {client_id}: {name} differs")

    @contextmanager
    def shared_model(self, sent: Sent) -> Iterator[None]:
        """Put what travels into the model, and nothing personal, for the length of a block."""
        with self.runtime.untouched():
            self.runtime.algorithm.install_shared(self.runtime.parts, sent)
            yield

    def _evaluate_base(self, client_id: str) -> Upload:
        """Score the pretrained model on the client's test split; asked for before the first round only."""
        metrics = self._scores(client_id, "test", "base")
        return Upload(metrics=metrics, beside={"routing_base": self._routing(client_id)})

    def exam(self) -> dict[str, Any]:
        """Return the accuracy of the model now in place; empty without an exam."""
        if not self._questions:
            return {}
        settings = self.runtime.settings.evaluation
        score = score_exam(
            self.runtime.parts.model,
            self.runtime.format,
            self._questions,
            settings.batch_size,
            normalise=settings.exam.normalise,
        )
        return {
            "accuracy": score.accuracy,
            "by_subject": score.by_subject,
            "num_questions": score.num_questions,
        }

    def retention(self) -> dict[str, float]:
        """Return the scores of the model now in place outside its task, and how many prompts they are of."""
        return self._retention()[0]

    def _retention(self) -> tuple[dict[str, float], list[str]]:
        """Return the same and the answers, questions first; both empty where nothing is asked."""
        if not len(self._probe):
            return {}, []
        runtime = self.runtime
        texts = answer_probe(runtime.parts.model, runtime.format, self._probe, runtime.settings.evaluation)
        sizes = {"num_free_questions": len(self._probe.questions), "num_neutral": len(self._probe.neutral)}
        return retention_scores(self._probe, texts) | sizes, texts

    def _own_retention(self, client_id: str, when: str) -> dict[str, float]:
        """Score a client's own model, if those are asked, and keep some of its answers after local steps."""
        if not self.runtime.settings.evaluation.exam.personalised:
            return {}
        scores, texts = self._retention()
        if texts and when == "after":
            self._keep_answers(client_id, {"off_task": self._off_task(texts)})
        return {f"{name}_{when}": scores[name] for name in RETENTION_SCORES if name in scores}

    def _off_task(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the first questions and the first instructions with their answers."""
        largest, start = self.runtime.settings.evaluation.num_predictions, len(self._probe.questions)
        asked = predictions(self.runtime.format, self._probe.examples, texts)
        return [*asked[: min(largest, start)], *asked[start:][:largest]]

    def _usable(self, client_id: str, split: Split, largest: int) -> list[Example]:
        """The first examples of a split; none where not one of them has a label to score."""
        examples = self.runtime.data.examples(client_id, split)
        examples = examples[:largest] if largest else examples
        return examples if encode_all(self.runtime.format, examples)[0] else []

    def _scores(
        self, client_id: str, split: Split, when: str, *, keep_predictions: bool = False
    ) -> dict[str, float]:
        settings = self.runtime.settings.evaluation
        examples = self._usable(client_id, split, settings.max_test_examples)
        if not examples:
            if split == "test":
                logger.warning("client %s has no test example with a label: it has no scores", client_id)
            return {"num_test": 0.0} if split == "test" else {}
        scores = evaluate_examples(self.runtime.parts.model, self.runtime.format, examples, settings)
        prefix = "" if split == "test" else f"{split}_"
        metrics = {
            f"{prefix}{name}_{when}": float(value)
            for name in (*SCORES, *FACETS)
            if (value := getattr(scores.facets if name in FACETS else scores, name)) is not None
        }
        if split == "test":
            metrics |= {
                "num_test": float(scores.num_test),
                "num_test_truncated": float(scores.num_truncated),
                "num_test_without_label": float(scores.num_without_label),
                "num_prompts_cut": float(scores.num_prompts_cut),
            }
        if keep_predictions:
            largest = settings.num_predictions
            self._keep_answers(client_id, {"predictions": scores.predictions[:largest]})
        return metrics

    def _own_scores(self, client_id: str, when: str) -> dict[str, float]:
        """Return the metrics that users registered; none for a client without a usable example."""
        runtime, settings = self.runtime, self.runtime.settings.evaluation
        examples = self._usable(client_id, "test", settings.max_test_examples) if settings.own_metrics else []
        scores = own_scores(runtime.parts.model, examples, runtime.format, settings) if examples else {}
        return {f"{name}_{when}": value for name, value in scores.items()}

    def _keep_answers(self, client_id: str, answers: Mapping[str, Sequence[Prediction]]) -> None:
        """Add lists of answers to what the client's file has."""
        files = self.runtime.store.files(client_id)
        is_begun = "predictions" not in answers and files.has(PREDICTIONS)
        kept = read_json(files.path / PREDICTIONS) if is_begun else {}
        records = {name: [asdict(item) for item in items] for name, items in answers.items()}
        files.write(PREDICTIONS, as_json({"client": client_id, "when": "after"} | kept | records))

    def _full_report(self, client_id: str, metrics: dict[str, float]) -> Tensors:
        own: Tensors = {}
        if self.runtime.settings.evaluation.exam.personalised and (exam := self.exam()):
            metrics["exam_personalised"] = exam["accuracy"]
            shares = [exam["by_subject"].get(subject, _MISSING) for subject in self.subjects]
            own = {SUBJECTS: torch.tensor(shares, dtype=torch.float64)}
        metrics |= self._own_retention(client_id, "after")
        return {"routing_personalised": self._routing(client_id), **self._matrix_row(), **own}

    def _matrix_row(self) -> Tensors:
        """Score this model on every client's test split; all their prompts share batches."""
        wanted, runtime = self._matrix_scores(), self.runtime
        if not wanted:
            return {}
        settings = runtime.settings.evaluation
        parts = [self._usable(other, "test", settings.matrix_examples) for other in runtime.data.client_ids]
        row: Tensors = {}
        if "loss" in wanted:
            row["matrix_loss"] = _cells(self._loss(own) if own else _MISSING for own in parts)
        if "rougeL" in wanted:
            asked = [example for own in parts for example in own]
            texts = iter(answer_examples(runtime.parts.model, runtime.format, asked, settings))
            answered = [([next(texts) for _ in own], [each.response for each in own]) for own in parts]
            row["matrix_rougeL"] = _cells(mean_rouge_l(*own) if own[0] else _MISSING for own in answered)
        return row

    def _loss(self, examples: Sequence[Example]) -> float:
        runtime = self.runtime
        return mean_loss(
            runtime.parts.model,
            encode_all(runtime.format, examples)[0],
            batch_size=runtime.settings.evaluation.batch_size,
            pad_token_id=runtime.format.pad_token_id,
        )

    def _routing(self, client_id: str) -> Tensor:
        runtime = self.runtime
        examples = self._usable(client_id, "test", runtime.settings.evaluation.max_test_examples)
        encoded, _ = encode_all(runtime.format, examples)
        if not encoded:
            counts = tuple(
                torch.zeros(layer.num_experts, dtype=torch.int64) for layer in runtime.parts.layers
            )
            return _padded(counts)
        batches = sequential_batches(
            encoded,
            batch_size=runtime.settings.evaluation.batch_size,
            pad_token_id=runtime.format.pad_token_id,
        )
        return _padded(count_tokens(runtime.parts.model, _with_prompts(batches)))


def _with_prompts(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches; while one is in use, its prompts are known to the model."""
    for batch in batches:
        with prompts_are(batch.prompts):
            yield batch


def _cells(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _padded(counts_LE: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(counts_LE), batch_first=True, padding_value=-1)


def table_of(routing: Tensor) -> list[list[int]]:
    """Return tokens per expert by layer, each layer as long as it has experts."""
    return [[tokens for tokens in layer if tokens >= 0] for layer in routing.tolist()]


def _bytes_of(sha256: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(sha256 or "00" * 32)), dtype=torch.uint8)


def hash_of(beside: Mapping[str, Tensor]) -> str:
    """Return the hash of what the client keeps, as text; empty if it keeps nothing."""
    values = bytes(beside[HASH].tolist())
    return values.hex() if any(values) else ""
