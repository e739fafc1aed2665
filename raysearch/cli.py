"""The command line: data on stdout, log on stderr; exit code 0 ok, 1 failed, 2 a question that cannot be answered."""

import importlib
import os
import pkgutil
import sys

import click

from raysearch import commands
from raysearch.errors import RaysearchError, RecordError, SweepError, TrialError

ORDER = (
    "list",
    "train",
    "sweep",
    "resume",
    "status",
    "front",
    "pick",
    "layers",
    "export",
    "report",
    "ui",
    "register",
    "mirror",
)
"""In which a person meets the commands; others come after these."""


class _Commands(click.Group):
    """The files of `raysearch.commands`, imported when they are called or described."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which a person meets them."""
        found = {module.name for module in pkgutil.iter_modules(commands.__path__)}
        return [*(name for name in ORDER if name in found), *sorted(found.difference(ORDER))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, if there is one."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"raysearch.commands.{cmd_name}").command
        command.name = cmd_name
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="raysearch")
def raysearch() -> None:
    """Find the best quantized networks: accuracy against BOPs and size."""


def main() -> None:
    """Entry point: turns errors into one line and an exit code."""
    from raysearch.facts import THREADS
    from trainables.errors import ConfigError, DataError, DivergedError, PluginError

    for name, value in THREADS.items():  # read when torch is loaded
        os.environ.setdefault(name, value)
    try:
        code = raysearch.main(prog_name="raysearch", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except (SweepError, RecordError, ConfigError, DataError, PluginError) as error:
        code = _say_error(error, 2)
    except (TrialError, DivergedError, RaysearchError, OSError) as error:  # OSError: a folder or a disk says no
        code = _say_error(error, 1)
    sys.exit(code or 0)


def _say_error(error: Exception, code: int) -> int:
    click.echo(f"error: {error}", err=True)
    return code


if __name__ == "__main__":
    main()
