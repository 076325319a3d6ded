"""The server's state at the end of a round, and going on from it."""

from fedexperts.algorithms.api import ServerState
from fedexperts.errors import UserError
from fedexperts.federation.personal import read_tensors, write_tensors
from fedexperts.run_directory import RunDirectory, keep_lines_until, read_json, write_json
from fedexperts.tensors import sha256_of


def save_checkpoint(run: RunDirectory, state: ServerState) -> None:
    """Make ``state`` the one to resume from; a crash before the end of this call leaves the one before."""
    name = f"round-{state.round:05d}.safetensors"
    write_tensors(run.state / name, state.tensors)
    write_json(
        run.checkpoint, {"round": state.round, "state": name, "state_sha256": sha256_of(state.tensors)}
    )
    for path in run.state.glob("round-*.safetensors"):
        if path.name != name:
            path.unlink()


def load_checkpoint(run: RunDirectory) -> ServerState | None:
    """The state of the last round that counts, or None before the first.

    Raises:
        UserError: the files are not what was written.
    """
    if not run.checkpoint.exists():
        return None
    record = read_json(run.checkpoint)
    tensors = read_tensors(run.state / record["state"])
    if sha256_of(tensors) != record["state_sha256"]:
        raise UserError(
            f"server state {run.state / record['state']} is not what checkpoint.json says: damaged?"
        )
    return ServerState(round=record["round"], tensors=tensors)


def drop_unfinished_round(run: RunDirectory, last_round: int) -> None:
    """Take out of the logs what a crash left of rounds after ``last_round``."""
    for path in (run.rounds, run.clients):
        keep_lines_until(path, last_round)
