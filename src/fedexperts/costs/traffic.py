"""Predict the bytes that a client sends and receives in a round, to the byte."""

from dataclasses import dataclass, replace

from fedexperts.algorithms.api import Algorithm, ModelParts, ServerState
from fedexperts.messages import predict_download_bytes, predict_upload_bytes


@dataclass(frozen=True, kw_only=True)
class PredictedBytes:
    """Size of one client's messages in one round."""

    upload: int
    download: int


def predict_round(
    algorithm: Algorithm, parts: ModelParts, state: ServerState, client_id: str, *, has_tables: bool = True
) -> PredictedBytes:
    """Return what ``client_id`` sends and receives in the round that ``state`` is planned for.

    Without ``has_tables`` it leaves out what only reports need.
    """
    expected = algorithm.expected(parts, state, client_id)
    return PredictedBytes(
        upload=predict_upload_bytes(expected if has_tables else replace(expected, tables={})),
        download=predict_download_bytes(algorithm.download(state, client_id)),
    )
