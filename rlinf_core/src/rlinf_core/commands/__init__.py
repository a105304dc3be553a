"""Core's subcommands of `rlinf`, one module each with `add_arguments(parser)` and `run(options)`."""
