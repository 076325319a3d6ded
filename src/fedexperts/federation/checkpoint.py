"""Save the server's state at the end of a round, and go on from it, or from one before."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedexperts.algorithms.api import ClientFacts, ServerState
from fedexperts.federation.personal import read_tensors, write_tensors
from fedexperts.federation.under_way import TurnUnderWay, UploadUnderWay, from_record
from fedexperts.integrity import committed_files, cut_logs, drop_states, read_record, refuse_lost_checkpoint
from fedexperts.releases import read_releases
from fedexperts.run_directory import RunDirectory, write_atomically
from fedexperts.seals import damaged, write_sealed
from fedexperts.tensors import sha256_of


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything the server goes on from."""

    state: ServerState
    kept_rounds: Mapping[str, int] = field(default_factory=dict)
    """For each client whose uploads were accepted, the round in which the last of these turns began."""
    under_way: tuple[TurnUnderWay, ...] = ()
    """Turns that have begun and whose uploads have not come; in asynchronous rounds alone. Those that are at
    work at sites are not gone on with: the sites are asked again."""

    @property
    def uploads(self) -> list[UploadUnderWay]:
        """Return those of them whose uploads lie on disk."""
        return [one for one in self.under_way if isinstance(one, UploadUnderWay)]


def state_sha256(state: ServerState) -> str:
    """Hash the server's tensors."""
    return sha256_of(state.beside, state.tensors)


def save_checkpoint(run: RunDirectory, checkpoint: Checkpoint, *, keep_states: int = 1) -> None:
    """Make ``checkpoint`` the one to resume from; a crash before the end of this call leaves the last one.

    Of the states before it the last ``keep_states - 1`` stay.
    """
    state = checkpoint.state
    parts = {"state": state.tensors, "beside": state.beside}
    names = {
        "state": state_name(state.round_number),
        "beside": f"beside-round-{state.round_number:05d}.safetensors",
    }
    hashes = {
        f"state/{names[part]}": write_tensors(run.state / names[part], tensors)
        for part, tensors in parts.items()
    }
    hashes |= _hashes_of_under_way(run, checkpoint)
    record = run.state_record(state.round_number)
    write_sealed(record, _record_of(run, checkpoint) | {"files": committed_files(run) | hashes} | names)
    write_atomically(run.checkpoint, record.read_bytes())
    drop_states(run, state.round_number, keep_states)


def _hashes_of_under_way(run: RunDirectory, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the hashes of uploads that are under way, and of the states that their clients received."""
    turns = checkpoint.under_way
    states = {state_name(one.received) for one in turns} - {state_name(checkpoint.state.round_number)}
    known = read_record(run.checkpoint)["files"] if states else {}
    return {f"{run.under_way.name}/{one.file}": one.sha256 for one in checkpoint.uploads} | {
        f"state/{name}": known[f"state/{name}"] for name in sorted(states)
    }


def state_name(round_number: int) -> str:
    """Return the name of the file with the server's tensors that go into the model, after a round."""
    return f"state-round-{round_number:05d}.safetensors"


def _record_of(run: RunDirectory, checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.state
    return {
        "round": state.round_number,
        "state_sha256": state_sha256(state),
        "seed": state.seed,
        "num_rounds": state.num_rounds,
        "clients": [asdict(facts) for facts in state.clients],
        "kept_rounds": dict(checkpoint.kept_rounds),
        "logs": {path.name: seal.seal() for path, seal in run.log_hashes.items()},
        **({"num_releases": read_releases(run.releases).total} if run.releases.exists() else {}),
        **({"under_way": [one.record() for one in checkpoint.uploads]} if checkpoint.uploads else {}),
    }


def load_checkpoint(run: RunDirectory) -> Checkpoint | None:
    """Return the state of the last round that counts, or None before the first.

    Raises:
        UserError: the files are not what was written.
    """
    if not run.checkpoint.exists():
        refuse_lost_checkpoint(run)
        return None
    record = read_record(run.checkpoint)
    try:
        hashes = record["files"]
        tensors, beside = (
            read_tensors(run.state / record[part], hashes[f"state/{record[part]}"])
            for part in ("state", "beside")
        )
        state = ServerState(
            round_number=record["round"],
            tensors=tensors,
            beside=beside,
            seed=record["seed"],
            num_rounds=record["num_rounds"],
            clients=tuple(ClientFacts(**facts) for facts in record["clients"]),
        )
        under_way = tuple(map(from_record, record.get("under_way", ())))
        return Checkpoint(state=state, kept_rounds=dict(record["kept_rounds"]), under_way=under_way)
    except (KeyError, TypeError):
        raise damaged(run.checkpoint) from None


def drop_unfinished_round(run: RunDirectory) -> None:
    """Remove what a crash, or going back, left of rounds that do not count: lines of the logs, and states."""
    if not run.checkpoint.exists():
        cut_logs(run, {})
        return
    record = read_record(run.checkpoint)
    cut_logs(run, record["logs"])
    drop_states(run, record["round"], keep_states=len(run.kept_rounds()))
