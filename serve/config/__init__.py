"""Options of the command line and of configuration files. Imports no jax, so that `--help` is fast."""
