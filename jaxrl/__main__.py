"""`python -m jaxrl` is the same as `jaxrl`."""

from jaxrl.cli import command

command()
