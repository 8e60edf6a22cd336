"""What the pages type has the options that there are."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from pages import PAGES, commands, fences, name_of

from moe_export.cli import cli
from moe_export.options.option import COMMANDS

OURS = re.compile(r'(?:^|[ ;&|(])moe-export (?P<args>(?:"[^"]*"|[^;|&>"])*)')


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
