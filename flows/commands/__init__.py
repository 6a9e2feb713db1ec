"""The commands that a person runs by hand: a module for each command of `puzzle` (flows/cli.py).

Each module has the description as its docstring, `EXAMPLE` (a command line that works), `add_arguments(parser)` and
`run(args)`. At module level it imports what parsing needs and what is quick; torch and Prefect are imported by `run`.
"""
