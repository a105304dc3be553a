"""Core's subcommands of `rlinf`, a module each: `add_arguments(parser)` and `run(options)`, imported when called."""
