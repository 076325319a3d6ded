"""FedRep: Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized
Federated Learning", ICML 2021, arXiv 2102.07089, Algorithm 1, on LoRA.

The parts are FedPer's: LoRA of the last layers is the personal head, the rest the shared body. In each round
a client first trains the head with the body frozen, then the body with the head frozen. ``reading N`` points
to docs/algorithms/fedrep.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedexperts.algorithms.api import Client, Kept, TrainedGroup, refuse_below, upload_of
from fedexperts.algorithms.fedper import FedPer
from fedexperts.errors import UserError
from fedexperts.messages import Sent, Upload
from fedexperts.training.local_steps import LocalResult


@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """Shared body, personal head, trained one after the other."""

    head_steps: int
    """Local steps on the head, of the round's ``training.num_local_steps``; the rest are on the body (the
    paper's tau, reading 1)."""

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        super().__post_init__()
        refuse_below(self, {"head_steps": 0}, exclusive=False)

    def client_update(self, client: Client, kept: Kept, sent: Sent) -> tuple[Upload, Kept]:
        """Train the head, then the body; send the body, keep the head."""
        kept = self.install(client, kept, sent)
        body, head = self.trained(client.parts, sent)
        self.refuse_idle(client, head, body)
        batches = client.draw_batches()
        results: list[LocalResult] = []
        if head.names:
            steps = batches[: self.head_steps]
            results.append(client.train((head,), batches=steps, optimizer_state=kept.optimizer))
        if body.names:
            purpose = "body_dropout" if results else "dropout"
            results.append(client.train((body,), batches=batches[self.head_steps :], purpose=purpose))
        result = _in_turn(results)
        return upload_of(client, body.names, sent, result), self.keep(client, kept, result)

    def refuse_idle(self, client: Client, head: TrainedGroup, body: TrainedGroup) -> None:
        """Raise UserError unless each part has steps, and steps have a part."""
        steps = client.training.num_local_steps
        least = 0 if not head.names else 1 if body.names else steps
        most = steps if not body.names else steps - 1 if head.names else 0
        if not least <= self.head_steps <= most:
            allowed = f"{least}" if least == most else f"from {least} to {most}"
            raise UserError(
                f"algorithm.head_steps must be {allowed} with training.num_local_steps = {steps} and "
                f"algorithm.personal_layers = {self.personal_layers}, not {self.head_steps}"
            )


def _in_turn(results: Sequence[LocalResult]) -> LocalResult:
    """Return the result of local steps that were taken in several calls."""
    return LocalResult(
        losses=[loss for one in results for loss in one.losses],
        gradient_norms=[norm for one in results for norm in one.gradient_norms],
        num_examples=sum(one.num_examples for one in results),
        num_labels=sum(one.num_labels for one in results),
        num_tokens=sum(one.num_tokens for one in results),
        untrained=tuple(name for one in results for name in one.untrained),
        optimizer_state={name: state for one in results for name, state in one.optimizer_state.items()},
    )
