"""Write a run's figures for TensorBoard."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedexperts.errors import needs_extra
from fedexperts.report.quantities import numbers_of
from fedexperts.running.callbacks import Callback


class TensorBoard(Callback):
    """Writes every number of each round, and at the end the means, as TensorBoard scalars.

    A resumed run adds to the folder. It needs the extra ``tensorboard``.
    """

    def __init__(self, folder: str | Path) -> None:
        """Write to ``folder``, which may hold earlier events; raise UserError without the package."""
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise needs_extra("fedexperts.TensorBoard", "tensorboard", "tensorboard") from error
        self._writer: Any = module.SummaryWriter(str(folder))

    def after_round(self, record: Mapping[str, Any]) -> None:
        """Write the record's numbers, e.g. ``seconds/train``."""
        self._write(
            {path: value for path, value in numbers_of(record).items() if path != "round"}, record["round"]
        )

    def finished(self, result: Mapping[str, Any]) -> None:
        """Write the means over clients, e.g. ``mean/loss_after``, and close the file."""
        self._write(numbers_of({"mean": result["mean"]}), result["rounds"])
        self._writer.close()

    def _write(self, numbers: Mapping[str, float], round_number: int) -> None:
        for path, value in numbers.items():
            self._writer.add_scalar(path.replace(".", "/"), value, round_number)
        self._writer.flush()
