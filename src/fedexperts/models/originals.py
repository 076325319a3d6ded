"""Open the checkpoint that a model was loaded from, so that its experts can be read again."""

import logging
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from fedexperts.errors import UserError
from fedexperts.models.checkpoint import Checkpoint
from fedexperts.models.load import TINY_PREFIX, ModelSettings, source_of

logger = logging.getLogger(__name__)


def open_originals(settings: ModelSettings) -> Checkpoint | None:
    """Return the checkpoint of a loaded model, or None if its experts cannot be read one by one.

    None means that experts are copied in memory before a client changes them.
    """
    if settings.name.startswith(TINY_PREFIX):
        return None
    try:
        folder = source_of(settings)
        if not isinstance(folder, Path):
            folder = Path(
                snapshot_download(folder, revision=settings.revision or None, local_files_only=True)
            )
        return Checkpoint(folder, getattr(torch, settings.dtype))
    except (UserError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        logger.info("experts of %s are copied in memory when clients change them: %s", settings.name, error)
        return None
