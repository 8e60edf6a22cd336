"""Every option of every command is used on some page: typed in a command that the tests run, or explained."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from pages import PAGES, commands, fences, name_of

from moe_export.cli import cli
from moe_export.options.option import COMMANDS
from moe_export.options.table import options_of

OURS = re.compile(r'(?:^|[ ;&|(])moe-export (?P<args>(?:"[^"]*"|[^;|&>"])*)')
INLINE = re.compile(r"`([^`\n]*?--[^`]*?)`", re.DOTALL)


def typed(text):
    """`(command, words of options)` of each call of the command line in a text."""
    for match in OURS.finditer(text):
        words = shlex.split(match["args"], comments=True)
        name = words[0] if words and words[0] in COMMANDS else "export"
        yield name, words[words[:1] == [name] :]


def in_consoles():
    """`(page, command, its arguments)` of each call that the tests of the pages run."""
    for page in PAGES:
        for language, text in fences(page):
            if language == "console":
                for line, _ in commands(text):
                    yield from ((name_of(page), name, words) for name, words in typed(line))


def options_in(words):
    return {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z0-9-]*(=.*)?", word)}


@pytest.mark.parametrize(("page", "name", "words"), list(in_consoles()), ids=lambda item: str(item)[:40])
def test_a_command_of_a_page_has_the_options_that_it_is_given(page, name, words):
    options = [param for param in cli.commands[name].params if isinstance(param, click.Option)]
    known = {word for option in options for word in (*option.opts, *option.secondary_opts)}
    known |= {"-h", "--help", "--help-all", "--version"}
    assert options_in(words) <= known, page


def used():
    """`(command, option)` of what the pages type, and options that they explain, for whatever command has them."""
    for _, name, words in in_consoles():
        yield from ((name, word) for word in options_in(words))
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for span in INLINE.findall(text):
            calls = list(typed(f" {span}"))
            yield from ((name, word) for name, words in calls for word in options_in(words))
            head = span.split()[0]
            names = COMMANDS if span.startswith("-") else (head,) if head in COMMANDS else ()
            yield from ((name, word) for word in options_in(span.split()) for name in names)


EVERYWHERE = {"Model", "Output"}
"""Groups whose options mean the same in every command: a use in one of these is enough. So it is of `report`, which
takes what an export takes."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_used_on_a_page(name):
    found = set(used())
    for option in options_of(name):
        anywhere = option.group in EVERYWHERE or (
            set(option.commands) >= {"export", "report"} and name == "report"
        )
        names = option.commands if anywhere else (name,)
        assert any((each, word) in found for each in names for word in option.words), option.word
