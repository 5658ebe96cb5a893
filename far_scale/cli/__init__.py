"""Command lines: one module per subcommand of `far-scale`; its `main` parses `sys.argv` and calls the library.

`far-scale NAME ...`, `python -m far_scale.cli.NAME ...` and `python tools/NAME.py ...` are the same command.
"""
