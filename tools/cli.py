"""The `abccl` command. A subcommand's module is imported when it is called for, so each starts fast."""

from __future__ import annotations

import importlib

import click

from ..algorithms.words import did_you_mean
from ..errors import AbcclError

COMMANDS = {
    "verify": ".verify:verify",
    "show": ".show:show",
    "draw": ".draw:draw",
    "algorithms": ".catalogue:catalogue",
    "explain": ".explain:explain",
    "doctor": ".doctor:doctor",
    "simulate": ".simulate:command",
    "tune": ".tune:tune",
    "inspect": ".inspect:inspect",
    "trace": ".trace:trace",
    "bench": "..bench.__main__:bench",
}


class LazyGroup(click.Group):
    """A group whose subcommands are named as "module:attribute", relative to this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command = getattr(importlib.import_module(module, __package__), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command is called {args[0]!r}: {did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except AbcclError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="abccl", message="%(prog)s %(version)s")
def main() -> None:
    """Collective algorithms: prove, show, draw and measure them.

    An algorithm is a schedule, written in Python; `abccl COMMAND --help` tells more.
    """
