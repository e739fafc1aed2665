"""`raysearch list`: what there is to choose from."""

import inspect
import json

import click

from raysearch.errors import SweepError

KINDS = ("methods", "models", "data", "spaces")


@click.command()
@click.argument("kind", type=click.Choice(KINDS), required=False)
@click.argument("name", required=False)
def command(kind: str | None, name: str | None) -> None:
    """List methods, models, data sets and search spaces; with a NAME, the settings of one."""
    from trainables.plugins import KINDS as PACKAGES
    from trainables.plugins import describe

    if kind and name:
        _list_settings(kind, name)
        return
    for each in [kind] if kind else KINDS:
        found = describe(PACKAGES[each])
        width = max(map(len, found))
        if not kind:
            click.echo(f"{each}:")
        for plugin, text in found.items():
            click.echo(f"{'' if kind else '  '}{plugin:{width}s} {text}")


def _list_settings(kind: str, name: str) -> None:
    """A line for each setting: address, default, what it is."""
    from trainables.plugin_settings import settings_of

    part = {"methods": "method", "models": "model", "data": "data"}.get(kind)
    if part is None:
        raise SweepError("a search space has no settings; `raysearch list spaces` says what each searches")
    for setting, (_, default, text) in settings_of(part, name).items():
        shown = "" if default is inspect.Parameter.empty else json.dumps(default, default=str)
        click.echo(f"{part}/{setting}={shown}  {text}".rstrip())
