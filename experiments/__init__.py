"""The shipped studies: TOML files that `--config NAME` finds."""
