"""What a client measures of its own models, where its data is."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedexperts.algorithms.aggregation import load_tensors
from fedexperts.data.batches import encode_all, sequential_batches
from fedexperts.data.examples import Example, Question
from fedexperts.data.split import SPLITS, Split
from fedexperts.evaluation.examples import evaluate_examples
from fedexperts.evaluation.multiple_choice import score_exam
from fedexperts.federation.personal import write_tensors
from fedexperts.messages import Download, Upload
from fedexperts.moe.observing.profile import count_tokens
from fedexperts.run_directory import write_json
from fedexperts.tensors import Tensors, sha256_of

if TYPE_CHECKING:
    from fedexperts.federation.runtime import ClientRuntime

ADAPTED = "adapted.safetensors"
"""File of a client's tensors after the local steps of the last evaluation."""


class Scorer:
    """Scores a client's model before and after local steps on the client's own test split.

    *Before* is what the server sent plus what the client keeps. *After* is the same model after one more turn
    of local steps, whose upload is thrown away and whose personal tensors are not kept.
    """

    def __init__(self, runtime: "ClientRuntime", questions: Sequence[Question]) -> None:
        """``questions`` of the knowledge exam; none leaves it out."""
        self._runtime, self._questions = runtime, questions

    def evaluate(self, client_id: str, download: Download) -> Upload:
        """Scores as ``metrics``; with task ``evaluate_fully`` also matrix row, routing and exam."""
        if download.task == "evaluate_base":
            return self._evaluate_base(client_id)
        runtime, fully = self._runtime, download.task == "evaluate_fully"
        started = time.perf_counter()
        personal = runtime.store.load(client_id, before_round=download.round)
        report = self._routing_without_personal(client_id, download) if fully else {}
        with runtime.turn(client_id, download.round) as client:
            installed = runtime.algorithm.install(client, personal, download.tensors)
            runtime.owned_by(client_id, installed, download.tensors)
            metrics = self._scores(client_id, "test", "before")
        with runtime.turn(client_id, download.round) as client:
            trained, personal_after = runtime.algorithm.client_update(client, personal, download.tensors)
            runtime.owned_by(client_id, personal_after, trained.tensors)
            metrics |= self._scores(client_id, "test", "after", keep_predictions=fully)
            metrics |= self._scores(client_id, "validation", "after")
            if fully:
                report |= self._full_report(client_id, metrics)
                adapted = runtime.adapted() | _extras(personal_after)
                write_tensors(runtime.store.folder(client_id) / ADAPTED, adapted)
        report |= self._facts(client_id, personal) | {"seconds": {"evaluate": time.perf_counter() - started}}
        return Upload(metrics=metrics, report=report)

    def _evaluate_base(self, client_id: str) -> Upload:
        """The untouched model on the client's test split; asked for before the first round only."""
        self._runtime.clean()
        metrics = self._scores(client_id, "test", "base")
        return Upload(metrics=metrics, report={"routing_base": self._routing(client_id)})

    def exam(self) -> dict[str, Any]:
        """Accuracy of the model now in place; empty without an exam."""
        if not self._questions:
            return {}
        settings = self._runtime.settings.evaluation
        score = score_exam(
            self._runtime.parts.model,
            self._runtime.format,
            self._questions,
            settings.batch_size,
            normalise=settings.exam.normalise,
        )
        return {
            "accuracy": score.accuracy,
            "by_subject": score.by_subject,
            "num_questions": score.num_questions,
        }

    def _examples(self, client_id: str, split: Split, largest: int) -> list[Example]:
        examples = self._runtime.data.examples(client_id, split)
        return examples[:largest] if largest else examples

    def _scores(
        self, client_id: str, split: Split, when: str, *, keep_predictions: bool = False
    ) -> dict[str, float]:
        settings = self._runtime.settings.evaluation
        examples = self._examples(client_id, split, settings.max_test_examples)
        if not examples:
            return {}
        scores = evaluate_examples(self._runtime.parts.model, self._runtime.format, examples, settings)
        prefix = "" if split == "test" else f"{split}_"
        metrics = {
            f"{prefix}{name}_{when}": float(value)
            for name in ("loss", "perplexity", "rougeL", "exact_match")
            if (value := getattr(scores, name)) is not None
        }
        if split == "test":
            metrics |= {
                "num_test": float(scores.num_test),
                "num_test_truncated": float(scores.num_truncated),
                "num_test_without_label": float(scores.num_without_label),
                "num_prompts_cut": float(scores.num_prompts_cut),
            }
        if keep_predictions:
            self._keep_predictions(client_id, scores.predictions)
        return metrics

    def _keep_predictions(self, client_id: str, predictions: Sequence[Any]) -> None:
        kept = predictions[: self._runtime.settings.evaluation.num_predictions]
        records = [
            {"prompt": item.prompt, "response": item.response, "prediction": item.prediction} for item in kept
        ]
        path = self._runtime.store.folder(client_id) / "predictions.json"
        write_json(path, {"client": client_id, "when": "after", "predictions": records})

    def _full_report(self, client_id: str, metrics: dict[str, float]) -> dict[str, Any]:
        settings = self._runtime.settings.evaluation
        report: dict[str, Any] = {"routing_personalised": self._routing(client_id)}
        if settings.exam.personalised and (exam := self.exam()):
            metrics["exam_personalised"] = exam["accuracy"]
        if settings.matrix and settings.matrix_examples:
            report["matrix"] = self._matrix_row()
        return report

    def _matrix_row(self) -> dict[str, Any]:
        """This model on every test split that lies on this machine; over a network, the client's alone."""
        settings = self._runtime.settings.evaluation
        row: dict[str, Any] = {"clients": [], "loss": [], "rougeL": []}
        for other in self._runtime.data.client_ids:
            examples = self._examples(other, "test", settings.matrix_examples)
            scores = evaluate_examples(self._runtime.parts.model, self._runtime.format, examples, settings)
            row["clients"].append(other)
            row["loss"].append(scores.loss)
            row["rougeL"].append(scores.rougeL)
        return row

    def _routing(self, client_id: str) -> list[list[int]]:
        runtime = self._runtime
        examples = self._examples(client_id, "test", runtime.settings.evaluation.max_test_examples)
        encoded, _ = encode_all(runtime.format, examples)
        batches = sequential_batches(
            encoded,
            batch_size=runtime.settings.evaluation.batch_size,
            pad_token_id=runtime.format.pad_token_id,
        )
        return [tokens_E.tolist() for tokens_E in count_tokens(runtime.parts.model, batches)]

    def _routing_without_personal(self, client_id: str, download: Download) -> dict[str, Any]:
        """Tokens per expert of the server's model on this client's test split, with nothing personal."""
        self._runtime.clean()
        load_tensors(self._runtime.parts.model, download.tensors)
        routing = self._routing(client_id)
        self._runtime.clean()
        return {"routing_global": routing}

    def _facts(self, client_id: str, personal: Tensors) -> dict[str, Any]:
        runtime = self._runtime
        facts: dict[str, Any] = {
            f"num_{split}": runtime.data.num_examples(client_id, split) for split in SPLITS
        }
        chosen = {name: personal[name].tolist() for name in ("chosen_experts",) if name in personal}
        return facts | chosen | {"personal_sha256": sha256_of(personal) if personal else ""}


def _extras(personal: Tensors) -> Tensors:
    """Personal tensors that are no parameters (which experts were copied), without the optimizer's."""
    return {
        name: tensor
        for name, tensor in personal.items()
        if "." not in name and not name.startswith("optimizer.")
    }
