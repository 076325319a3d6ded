"""The bytes of a message as Flower carries them, and back; the only place that knows both.

One message is one block of bytes. Many small tensors would be ruinous (two requests for each of them and hop)
and Flower's own arrays know no bfloat16; a block it cuts into chunks of 5 MiB, and sends a block that many
nodes get only once.
"""

from flwr.app import Array, ArrayRecord, RecordDict

from fedexperts.errors import UserError

RECORD, ARRAY = "fedexperts", "message"
"""Names of the one record in a message and of the one array in that record."""

ENCODING = "fedexperts.message"
"""Flower's ``stype``: how the array's bytes are to be read. Flower itself never looks into them."""


def pack(message: bytes) -> RecordDict:
    """The content of a Flower message that carries ``message``."""
    array = Array(dtype="uint8", shape=(len(message),), stype=ENCODING, data=message)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})


def unpack(content: RecordDict) -> bytes:
    """Inverse of :func:`pack`.

    Raises:
        UserError: ``content`` is anything else.
    """
    record = content.get(RECORD)
    array = record.get(ARRAY) if isinstance(record, ArrayRecord) else None
    if array is None or len(content) != 1 or len(record) != 1 or array.stype != ENCODING:
        raise UserError("the Flower message does not carry one FedExperts message")
    return bytes(array.data)
