"""Remove what a run holds of a client: tensors, answers, and figures. Imports no torch."""

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedexperts.client_folder import RECORD
from fedexperts.errors import UserError
from fedexperts.integrity import drop_states, has_clients, read_record
from fedexperts.run_directory import RunDirectory, read_lines, write_atomically
from fedexperts.running.client_names import client_names, resolve_client
from fedexperts.seals import read_sealed, write_sealed

Json = dict[str, Any]

_LEDGER = (
    "round",
    "client",
    *(f"{way}_{how}" for way in ("upload", "download") for how in ("bytes", "predicted")),
)
"""Entries of a line of clients.jsonl that stay: without them the run's bytes would not add up."""
_MADE = {"report.html": "report", "REPORT.md": "report", "extraction.json": "extract"}
"""Files with figures by client, and the command that makes each anew."""


def forget(folder: Path, client: str | None) -> list[str]:
    """Remove one client, or all of them, from a run directory or from a run's folder on a Flower node.

    Of the server's model nothing is taken back: a client's uploads are part of every mean.

    Args:
        folder: the folder.
        client: id or name of one client; None for all.

    Returns:
        A sentence for each thing that was removed.

    Raises:
        UserError: the folder is neither, there is no such client, or another process runs the run.
    """
    run = RunDirectory(folder)
    if not run.config.exists():
        return list(_forget_on_node(folder, client))
    with run.claim(resume=True), run.lock():
        clients = _clients_of(run) if client is None else [_resolve(run, client)]
        return [*_forget_in_run(run, clients), *_remove_reports(run)]


def _forget_on_node(folder: Path, client: str | None) -> Iterator[str]:
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{RECORD}"))}
    if not found:
        raise UserError(
            f"{folder} holds no run (no config.toml), and nothing that a client keeps (*/{RECORD})"
        )
    if client is not None and client not in found:
        raise UserError(f"client {client!r} is not in {folder}: it must be one of {', '.join(found)}")
    for client_id in found if client is None else [client]:
        yield _remove(found[client_id])


def _remove(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder)
    return f"removed {folder}: {len(files)} files, {size} bytes"


def _clients_of(run: RunDirectory) -> list[str]:
    """Return the ids of all clients that the run knows of and has not forgotten."""
    known = read_record(run.checkpoint)["clients"] if run.checkpoint.exists() else []
    return sorted({*client_names(run.path), *(facts["client_id"] for facts in known)})


def _resolve(run: RunDirectory, client: str) -> str:
    return client if client in _clients_of(run) else resolve_client(run.path, client)


def _forget_in_run(run: RunDirectory, clients: Collection[str]) -> Iterator[str]:
    """Remove clients; after a crash it can be done again, for the checkpoint with the seals comes last."""
    for client_id in clients:
        if (run.client_folders / client_id).is_dir():
            yield _remove(run.client_folders / client_id)
    if run.base.exists():
        base = read_sealed(run.base)
        write_sealed(run.base, base | {"clients": _without(base["clients"], clients)})
    if run.result.exists():
        write_sealed(run.result, _result_without(read_sealed(run.result), clients))
        yield f"removed from {run.result} and {run.base.name}: scores, names and labels of {_list(clients)}"
    lines = read_lines(run.clients)
    num_lines = sum(line["client"] in clients for line in lines)
    if num_lines:
        kept = [_bytes_alone(line) if line["client"] in clients else line for line in lines]
        write_atomically(run.clients, "".join(json.dumps(line) + "\n" for line in kept).encode())
        yield f"removed from {run.clients}: all but bytes in {num_lines} lines of {_list(clients)}"
    if run.checkpoint.exists():
        _seal(run, clients)
    if not has_clients(run):
        yield "what the clients keep is on their own machines: fedexperts forget removes it there"


def _without(by_client: Json, clients: Collection[str]) -> Json:
    return {client_id: own for client_id, own in by_client.items() if client_id not in clients}


def _result_without(result: Json, clients: Collection[str]) -> Json:
    """Return a result without what it says of clients; means over all clients stay as they were computed."""
    routing = result["routing"]
    return result | {
        "clients": _without(result["clients"], clients),
        "personal_sha256": _without(result["personal_sha256"], clients),
        "routing": routing | {"tokens_per_expert": _without(routing["tokens_per_expert"], clients)},
        "matrix": _matrix_without(result["matrix"], clients),
        "forgotten": sorted({*result.get("forgotten", []), *clients}),
    }


def _matrix_without(matrix: Json | None, clients: Collection[str]) -> Json | None:
    if matrix is None:
        return None
    stay = [place for place, client_id in enumerate(matrix["clients"]) if client_id not in clients]
    cells = {
        name: [[rows[row][column] for column in stay] for row in stay] if rows else []
        for name, rows in matrix.items()
        if name != "clients"
    }
    return {"clients": [matrix["clients"][place] for place in stay], **cells}


def _bytes_alone(line: Json) -> Json:
    return {name: line[name] for name in _LEDGER} | {"forgotten": True}


def _seal(run: RunDirectory, clients: Collection[str]) -> None:
    """Write the checkpoint with the new hashes, and delete the states before it, which need what is gone.

    Uploads that are under way, and what they began from, go too: the run is not gone on with.
    """
    record = read_record(run.checkpoint)
    last_state = {f"{run.state.name}/{record[part]}" for part in ("state", "beside")}
    facts = [
        own | {"num_train": 0, "memory_bytes": 0} if own["client_id"] in clients else own
        for own in record["clients"]
    ]
    changed = record | {
        "clients": facts,
        "kept_rounds": _without(record["kept_rounds"], clients),
        "logs": {path.name: growing.seal() for path, growing in run.log_hashes.items()},
        "files": {
            name: seal for name, seal in record["files"].items() if name in last_state or "/" not in name
        },
        "forgotten": sorted({*record.get("forgotten", []), *clients}),
    }
    changed.pop("under_way", None)
    write_sealed(run.state_record(record["round"]), changed)
    drop_states(run, record["round"], keep_states=1)
    write_atomically(run.checkpoint, run.state_record(record["round"]).read_bytes())


def _remove_reports(run: RunDirectory) -> Iterator[str]:
    for name, command in _MADE.items():
        if (run.path / name).exists():
            (run.path / name).unlink()
            yield f"removed {run.path / name}, which fedexperts {command} makes anew"


def _list(clients: Collection[str]) -> str:
    return ", ".join(sorted(clients))
