"""The Flower client app. It imports neither torch nor a model: Flower starts a process for each message.

On a node the turn is taken by a worker that stays warm; in a simulation, whose processes stay, by this one.
"""

import importlib
import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedexperts.errors import UserError
from fedexperts.federation.flower_submitted import completed
from fedexperts.federation.warm import ask_worker
from fedexperts.federation.wire import pack, unpack

app = ClientApp()

_PROGRAM = "flwr-clientapp"
"""Flower's program that lives for one message."""


@app.train()  # type: ignore[untyped-decorator]
def answer(message: Message, context: Context) -> Message:
    """Have the download answered."""
    request = {"run_config": {}, "node_config": dict(context.node_config), "refused": ""}
    try:
        request["run_config"] = completed(context.run_config, context.run_id)
        blob = unpack(message.content)
    except UserError as error:
        blob, request["refused"] = b"", str(error)
    folder = _folder(context)
    if folder and Path(sys.argv[0]).name == _PROGRAM:
        reply = ask_worker(folder, request, blob, seconds=message.metadata.ttl)
    else:
        answers = importlib.import_module("fedexperts.federation.flower_answers")
        reply = answers.answer_bytes(blob, **request)
    return Message(pack(reply), reply_to=message)


def _folder(context: Context) -> Path | None:
    """Return the folder of a node that has one of its own."""
    site, own = (str(context.node_config.get(key, "")) for key in ("site", "personal-folder"))
    return Path(site).parent if site else Path(own) if own else None
