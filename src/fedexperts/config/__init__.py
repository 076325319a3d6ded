"""Read TOML files and ``key=value`` into the settings of a run."""
