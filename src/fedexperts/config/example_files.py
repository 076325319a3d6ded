"""Write the example files that come with the package."""

from importlib import resources
from pathlib import Path

from fedexperts.errors import UserError


def write_example(name: str, path: Path) -> None:
    """Write the example ``name`` (``experiment.toml`` or ``suite.toml``) to the new file ``path``.

    Raises:
        UserError: there is such a file.
    """
    text = (resources.files("fedexperts") / "assets" / "examples" / name).read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists, and init never overwrites: name another file") from None
