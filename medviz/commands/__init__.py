"""The subcommands of `python -m medviz`, one module each with `main(argv) -> exit status`."""
