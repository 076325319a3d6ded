"""Define the settings of the evaluation: scores, amount of data, and frequency."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from fedexperts.errors import UserError

Metric = Literal["loss", "rougeL", "exact_match"]
"""``loss`` brings perplexity with it; the other two generate answers."""
WHENS = ("before", "after")
"""Times at which a client's own model is scored: before and after its local steps."""
AnswerForm = Literal["text", "letter"]


@dataclass(frozen=True, kw_only=True)
class ExamFields:
    """Section ``[evaluation.exam.fields]``: the names of a record's fields in a file of questions."""

    question: str = "question"
    """Field with the question, a text."""
    choices: str = "choices"
    """Field with the list of choices, or the prefix of the numbered fields `choices0`, `choices1`, ...; left
    at its default, `choice0`, `choice1`, ... are tried too."""
    answer: str = "answer"
    """Field with the right choice: its index from 0, or its letter from A."""
    subject: str = "subject"
    """Field with the subject, by which accuracy is also reported; left at its default, it may be absent."""

    def __post_init__(self) -> None:
        for name in ("question", "choices", "answer"):
            if not getattr(self, name):
                raise UserError(f"evaluation.exam.fields.{name} is empty; it must name a field of the file")


@dataclass(frozen=True, kw_only=True)
class ExamSettings:
    """Section ``[evaluation.exam]``: the knowledge exam, which shows what fine-tuning made a model forget."""

    source: str = "auto"
    """`auto` (tinyworld's exam where `data.source` is tinyworld, else none), `none`, `tinyworld`, or a file
    of JSON lines (.json, .jsonl, also .gz)."""
    num_questions: int = 200
    """Questions drawn by the run's seed; 0 takes all there are."""
    fields: ExamFields = field(default_factory=ExamFields)
    """Names of the fields in a file of questions."""
    answer_form: AnswerForm = "text"
    """`text` scores each choice as the answer; `letter` lists the choices in the prompt and scores their
    letters, as is usual for MMLU."""
    normalise: bool = False
    """Compare log-likelihoods per token instead of sums, so that long choices are not at a disadvantage."""
    personalised: bool = True
    """Also ask every client's personalised model, not only the server's: the exam, and what
    `evaluation.retention` adds."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("evaluation.exam.source is empty; it must be auto, none, tinyworld or a file")
        if self.num_questions < 0:
            raise UserError(f"evaluation.exam.num_questions is {self.num_questions}; it must be at least 0")
        if self.answer_form not in get_args(AnswerForm):
            raise UserError(
                f'evaluation.exam.answer_form is "{self.answer_form}"; it must be '
                f"{' or '.join(get_args(AnswerForm))}"
            )


@dataclass(frozen=True, kw_only=True)
class RetentionSettings:
    """Section ``[evaluation.retention]``: what models still answer in their own words outside their task."""

    num_free_questions: int = 32
    """Maximum number of the exam's questions that are also asked without their choices, drawn by the run's
    seed; 0 asks none."""
    neutral: str = "auto"
    """Source of neutral instructions: `auto` (tinyworld's where `data.source` is tinyworld, else none),
    `none`, `tinyworld`, or a file or folder of JSON lines with the fields of `data.fields`."""
    num_neutral: int = 32
    """Maximum number of neutral instructions, drawn by the run's seed; 0 asks none."""

    def __post_init__(self) -> None:
        if not self.neutral:
            raise UserError(
                "evaluation.retention.neutral is empty; it must be auto, none, tinyworld or a file"
            )
        for name in ("num_free_questions", "num_neutral"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"evaluation.retention.{name} is {getattr(self, name)}; it must be at least 0"
                )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Section ``[evaluation]``."""

    metrics: tuple[Metric, ...] = ("loss", "rougeL", "exact_match")
    """Scores of a client's test split; without `rougeL` and `exact_match` nothing is generated."""
    own_metrics: tuple[str, ...] = ()
    """Registered metrics of your own, also computed on each client's test split (docs/api.md)."""
    max_new_tokens: int = 64
    """Maximum number of tokens of a generated answer."""
    batch_size: int = 32
    """Sequences per forward pass; it changes speed and memory, not the scores."""
    max_test_examples: int = 0
    """Test examples scored per client, the first of its test split; 0 scores all."""
    every: int = 0
    """Rounds between evaluations during the run; 0 evaluates after the last round only."""
    matrix: bool = True
    """Also score every client's model on every client's test split."""
    matrix_examples: int = 20
    """Test examples per cell of that matrix."""
    matrix_clients: int = 50
    """Most clients with which the matrix is made: its time grows with the square of their number."""
    exam: ExamSettings = field(default_factory=ExamSettings)
    """The knowledge exam."""
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    """Answers outside the clients' tasks: the exam's questions without choices, and neutral instructions."""
    num_predictions: int = 5
    """Generated answers kept per client in the run directory: of its test split, and as many free answers and
    neutral instructions."""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError(f"evaluation.metrics is empty; it must name some of {_METRICS}")
        for metric in self.metrics:
            if metric not in get_args(Metric):
                raise UserError(f'evaluation.metrics names "{metric}"; it must name some of {_METRICS}')
        if len(set(self.own_metrics)) < len(self.own_metrics):
            raise UserError(f"evaluation.own_metrics names a metric twice: {', '.join(self.own_metrics)}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"evaluation.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def mean_scores(self) -> tuple[str, ...]:
        """Names of the mean scores that every evaluation of a run gives."""
        brings = {"loss": ("loss", "perplexity")}
        scores = [score for metric in self.metrics for score in brings.get(metric, (metric,))]
        means = [f"{score}_{when}" for score in (*scores, *self.own_metrics) for when in WHENS]
        return (*means, *(("exam_global",) if self.exam.source != "none" else ()))

    @property
    def generates(self) -> bool:
        return "rougeL" in self.metrics or "exact_match" in self.metrics


_METRICS = ", ".join(get_args(Metric))
_LEAST = {
    "max_new_tokens": 1,
    "batch_size": 1,
    "max_test_examples": 0,
    "every": 0,
    "matrix_examples": 1,
    "matrix_clients": 2,
    "num_predictions": 0,
}
