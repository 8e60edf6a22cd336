"""Commands as click knows them: their options come from the table, and their help shows these in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.options.option import GROUPS, Option
from moe_export.options.table import options_of

MOST = 25
"""Options on the first screen of a command's help, those that ask for help among them: about what a screen holds."""
_COLUMN = 30


class TableOption(click.Option):
    """An option of the table.

    Attributes:
        option: What the table says of it.
    """

    def __init__(self, option: Option, needed: Option | None = None) -> None:
        self.option = option
        pair = "/--no-" in option.spelling  # click's way to write a flag and its opposite
        kind: dict[str, Any] = {"type": option.type, "multiple": option.repeatable, "default": option.default}
        if option.is_flag and not pair:
            kind = {"is_flag": True, "flag_value": not option.unset, "default": option.unset}
        elif pair:
            kind = {"default": option.default}
        super().__init__(
            [*((option.spelling,) if pair else option.words), option.name],
            help=_help(option, needed),
            metavar=option.metavar,
            required=option.required,
            expose_value=option.name != "debug",  # whoever prints an error looks for it
            show_default=option.default is not None and not option.is_flag,
            **kind,
        )


def _help(option: Option, needed: Option | None) -> str:
    text = option.help.removesuffix(".")
    if needed is not None and not needed.required:
        text = f"With {needed.word}: {text[0].lower()}{text[1:]}"
    repeatable = " (repeatable)." if option.repeatable else "."
    otherwise = f"  [default: {option.otherwise}]" if option.otherwise else ""
    return f"{text}{repeatable}{otherwise}"


class TableCommand(click.Command):
    """A command whose options are those of the table, in groups; `--help` shows the usual ones, `--help-all` all."""

    def __init__(self, name: str, *, params: list[click.Parameter] | None = None, **attributes: Any) -> None:
        self.options = options_of(name)
        by_name = {option.name: option for option in self.options}
        own = [TableOption(option, by_name.get(option.goes_with)) for option in self.options]
        super().__init__(name, params=[*(params or ()), *own], **attributes)

    @property
    def first(self) -> tuple[Option, ...]:
        """The options of the first screen: all if they fit on it."""
        fits = len(self.options) + 2 <= MOST
        return tuple(option for option in self.options if fits or option.first)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Click's, and `--help-all`."""
        return [*super().get_params(ctx), self._help_all()]

    def _help_all(self) -> click.Option:
        return click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            help=f"Show all {len(self.options)} options and exit.",
            callback=self._show_all,
        )

    def _show_all(self, ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[self._all] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, with a console instead of the options that say how much is printed.

        Raises:
            UsageError: An option means nothing without another one.
        """
        check_together(self.options, ctx.params)
        ctx.params["console"] = Console(
            ctx.params.pop("quiet"), ctx.params.pop("as_json"), ctx.params.pop("verbose", False)
        )
        return super().invoke(ctx)

    _all = "moe_export.help_all"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, group by group; how to see the others."""
        shown = self.options if ctx.meta.get(self._all) else self.first
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        helps = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if isinstance(param, TableOption):
                groups[param.option.group] += [record] if record and param.option in shown else []
            elif record and isinstance(param, click.Option):
                helps.append(record)
        groups["Output"] += helps
        width = max(min(len(word), _COLUMN) for rows in groups.values() for word, _ in rows)
        for group, rows in groups.items():
            if rows:
                with formatter.section(group):
                    formatter.write_dl([(word.ljust(width), text) for word, text in rows], col_max=_COLUMN)
        hidden = len(self.options) - len(shown)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} more options: {ctx.command_path} --help-all")


def check_together(options: Sequence[Option], given: Mapping[str, Any]) -> None:
    """Refuse an option that would have no effect: the one that it goes with is not given.

    Raises:
        UsageError: There is one.
    """
    by_name = {option.name: option for option in options}
    for option in options:
        needed = by_name[option.goes_with] if option.goes_with else option
        if given.get(option.name, option.unset) != option.unset and given[needed.name] == needed.unset:
            choices = () if needed.is_flag or needed.metavar else needed.type.choices
            value = needed.metavar or next((each for each in choices if each != needed.default), "")
            raise UsageError(f"{option.word} goes with {needed.word}", hint=f"{needed.word} {value}".strip())
