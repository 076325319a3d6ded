"""Remove what a run holds of a client: tensors, answers, and figures. Imports no torch."""

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedexperts.client_folder import RECORD
from fedexperts.errors import UserError
from fedexperts.integrity import drop_states, has_clients, read_record
from fedexperts.run_directory import RunDirectory, write_atomically
from fedexperts.running.client_names import client_names, resolve_client
from fedexperts.seals import check_log, damaged, read_sealed, seal_of_log, write_sealed
from fedexperts.site_seals import is_at_site, read_site_record, write_site_record

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
    record = _record_of(run)
    known = [record["client"]] if is_at_site(run) else [one["client_id"] for one in record.get("clients", [])]
    return sorted({*client_names(run.path), *known})


def _record_of(run: RunDirectory) -> Json:
    """Return the record with the seals of the logs, of the server or of a site; empty before the first."""
    if is_at_site(run):
        return read_site_record(run)
    return read_record(run.checkpoint) if run.checkpoint.exists() else {}


def _resolve(run: RunDirectory, client: str) -> str:
    return client if client in _clients_of(run) else resolve_client(run.path, client)


def _forget_in_run(run: RunDirectory, clients: Collection[str]) -> Iterator[str]:
    """Remove clients; after a crash it can be done again, for the new seals are written first.

    Raises:
        UserError: a file that would get a new hash is damaged; nothing is removed.
    """
    base, result = (read_sealed(path) if path.exists() else {} for path in (run.base, run.result))
    record = _record_of(run)
    forgotten = {*record.get("forgotten", ()), *clients}
    lines = _without_figures(run, _sealed_lines(run, record), forgotten)
    num_lines = sum(json.loads(line)["client"] in clients for line in lines.splitlines())
    if record:
        _seal(run, record, forgotten, lines)
    for client_id in clients:
        if (run.client_folders / client_id).is_dir():
            yield _remove(run.client_folders / client_id)
    if base:
        write_sealed(run.base, base | {"clients": _without(base["clients"], clients)})
    if result:
        write_sealed(run.result, _result_without(result, clients))
        yield f"removed from {run.result} and {run.base.name}: scores, names and labels of {_list(clients)}"
    if run.clients.exists():
        write_atomically(run.clients, lines)
    if num_lines:
        yield f"removed from {run.clients}: all but bytes in {num_lines} lines of {_list(clients)}"
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


def _sealed_lines(run: RunDirectory, record: Json) -> bytes:
    """Return the lines of clients.jsonl that count; all of them where nothing has a seal yet.

    Raises:
        UserError: a log is not as it was written, nor as forgetting that was killed has left it.
    """
    content = run.clients.read_bytes() if run.clients.exists() else b""
    content = content[: content.rfind(b"\n") + 1]
    if not record:
        return content
    seals = {path.name: record["logs"].get(path.name, seal_of_log(b"")) for path in run.log_hashes}
    check_log(run.rounds, seals[run.rounds.name])
    seal = seals[run.clients.name]
    try:
        check_log(run.clients, seal)
    except UserError:
        content = _without_figures(run, content, record.get("forgotten", ()))
        if seal_of_log(content[: seal["num_bytes"]]) != seal:
            raise
    return content[: seal["num_bytes"]]


def _without_figures(run: RunDirectory, lines: bytes, clients: Collection[str]) -> bytes:
    """Return lines of clients.jsonl with nothing but bytes in those of ``clients``."""
    try:
        read = [json.loads(line) for line in lines.splitlines()]
        kept = [_bytes_alone(line) if line["client"] in clients else line for line in read]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise damaged(run.clients) from None
    return "".join(json.dumps(line) + "\n" for line in kept).encode()


def _bytes_alone(line: Json) -> Json:
    return {name: line[name] for name in _LEDGER} | {"forgotten": True}


def _seal(run: RunDirectory, record: Json, forgotten: Collection[str], lines: bytes) -> None:
    """Write the record with the new hashes, before anything is removed."""
    changed = record | {
        "logs": record["logs"] | {run.clients.name: seal_of_log(lines)},
        "forgotten": sorted(forgotten),
    }
    if is_at_site(run):
        folders = tuple(f"{run.client_folders.name}/{client_id}/" for client_id in forgotten)
        left = [name for name in record["present"] if not name.startswith(folders)]
        write_site_record(run, changed | {"present": left})
    else:
        _seal_at_server(run, changed, forgotten)


def _seal_at_server(run: RunDirectory, record: Json, clients: Collection[str]) -> None:
    """Write the checkpoint, and delete the states before it, which need what is gone.

    Uploads that are under way, and what they began from, go too: the run is not gone on with.
    """
    last_state = {f"{run.state.name}/{record[part]}" for part in ("state", "beside")}
    facts = [
        own | {"num_train": 0, "memory_bytes": 0} if own["client_id"] in clients else own
        for own in record["clients"]
    ]
    changed = record | {
        "clients": facts,
        "kept_rounds": _without(record["kept_rounds"], clients),
        "files": {
            name: seal for name, seal in record["files"].items() if name in last_state or "/" not in name
        },
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
