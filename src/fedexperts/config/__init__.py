"""From TOML and ``key=value`` to the settings of a run."""
