"""The table of options: every command's are made from it, and its help shows them in groups, the usual ones first."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections import Counter

import click
import pytest

from moe_export.cli import cli
from moe_export.commands.terminal import MOST
from moe_export.errors import UsageError
from moe_export.export.options import Options
from moe_export.export.stages import PIPELINE
from moe_export.options.option import COMMANDS, GROUPS, READERS, STAGES
from moe_export.options.sizes import parse_one_set, parse_sizes
from moe_export.options.table import OPTIONS, options_of, typed

WORD = re.compile(r"^  (?:-\w, )?(--[a-z][a-z0-9-]*)", re.MULTILINE)


def shown(command, *args):
    """The options that help shows, by their longest words."""
    done = command(*args)
    assert done.code == 0, done.err
    return WORD.findall(done.out), done.out


def test_the_table_names_every_command_stage_and_group():
    assert set(COMMANDS) == set(cli.commands)
    assert tuple(stage.name for stage in PIPELINE) == STAGES
    for option in OPTIONS:
        assert set(option.commands) <= set(COMMANDS), option
        assert set(option.read_by) <= set(READERS), option
        assert option.group in GROUPS, option
        assert option.help.endswith("."), option
    assert {option.group for option in OPTIONS} == set(GROUPS)


def test_what_a_stage_reads_is_a_field_of_its_options():
    fields = {field.name for field in dataclasses.fields(Options)} | {"static", "dynamic"}
    read = {option.name for option in options_of("export") if set(option.read_by) & set(STAGES)}
    assert read <= fields


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_the_table_and_no_others(name):
    made = [param.name for param in cli.commands[name].params if isinstance(param, click.Option)]
    assert made == [option.name for option in options_of(name)]
    assert max(Counter(word for option in options_of(name) for word in option.words).values()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_usual_options_and_how_to_see_all(command, name):
    first, text = shown(command, name, "--help")
    every, _ = shown(command, name, "--help-all")
    assert len(first) <= MOST
    words = {next(word for word in option.words if word.startswith("--")) for option in options_of(name)}
    assert set(every) == words | {"--help", "--help-all"}
    hidden = len(every) - len(first)
    assert text.endswith(f"\n{hidden} more options: moe-export {name} --help-all\n") == (hidden > 0)


def test_an_option_is_typed_as_it_was_given():
    by_word = {option.word: option for option in options_of("verify")}
    assert list(typed(by_word["--thorough"], True)) == ["--thorough"]
    assert list(typed(by_word["--thorough"], False)) == []
    assert list(typed(by_word["--no-localise"], False)) == ["--no-localise"]
    assert list(typed(by_word["--init"], ("a=1", "b=2"))) == ["--init", "a=1", "--init", "b=2"]
    assert list(typed(by_word["--rtol"], None)) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_not_given_is_what_the_table_says(name):
    context = cli.commands[name].make_context(name, ["x"] * 2, resilient_parsing=True)
    for option in options_of(name):
        assert context.params.get(option.name, False) == option.unset, option


def test_a_comparison_is_done_again_with_all_that_it_was_judged_by(command, write, texts):
    model = write(texts["model"], "net.py")
    other = write(texts["model"].replace("relu()", "tanh()"), "other.py")
    assert command(other, "--quiet", "-o", "out").code == 0
    done = command(
        "verify",
        "out/other.onnx",
        "--against",
        model,
        "--size",
        "sequence=7",
        "--rtol",
        "1e-4",
        "--no-localise",
    )
    assert done.code == 1
    again = next(line for line in done.out.splitlines() if "--case" in line)
    assert "verify out/other.onnx --size sequence=7 --rtol 0.0001 --against" in again


def test_sizes_are_typed_in_one_way():
    assert parse_sizes(" batch = 1, sequence=4096") == {"batch": 1, "sequence": 4096}
    assert parse_one_set([]) == {}
    for text in ("sequence", "sequence=-1", "sequence=1:2:3", "=4", ""):
        with pytest.raises(UsageError, match="is not DIM=SIZE"):
            parse_sizes(text)
    with pytest.raises(UsageError, match="gives sequence two sizes"):
        parse_sizes("sequence=1,sequence=2")
    with pytest.raises(UsageError, match="all sizes at once") as error:
        parse_one_set(["a=1", "b=2"])
    assert error.value.hint == "--size a=1,b=2"


def test_a_gate_and_no_gate_contradict_each_other(command, write, texts):
    done = command(write(texts["gate"]), "--gate", "gate", "--no-gate")
    assert (done.code, "--gate and --no-gate contradict each other" in done.err) == (2, True)


TOGETHER = [(name, option) for name in COMMANDS for option in options_of(name) if option.goes_with]


@pytest.mark.parametrize(("name", "option"), TOGETHER, ids=lambda each: getattr(each, "name", each))
def test_an_option_that_would_have_no_effect_is_refused(command, name, option):
    needed = next(other for other in options_of(name) if other.name == option.goes_with)
    if needed.required:
        return
    value = [] if option.is_flag else [getattr(option.type, "choices", [None, "x"])[-1]]
    done = command(name, "nothing.py", option.word, *value)
    assert (done.code, done.err.splitlines()[0]) == (2, f"error: {option.word} goes with {needed.word}")


@pytest.mark.parametrize(
    ("source", "words", "said"),
    [
        ("net.onnx", ["--check"], "--check is of a Python file, not of net.onnx"),
        ("net.py", ["--prove"], "--prove is of an ONNX file, not of net.py"),
        ("ij,jk->ik", ["--in-place"], "--in-place is of a Python file, not of ij,jk->ik"),
        ("net.py", ["--check", "--size", "b=2"], "--size is of an equation, not of net.py"),
    ],
)
def test_an_option_of_another_kind_of_file_is_refused(command, source, words, said):
    done = command("rewrite", source, *words)
    assert (done.code, done.err) == (2, f"error: {said}\n")


def test_a_golden_file_has_the_cases_that_it_has(command, finished, tmp_path):
    golden = tmp_path / "golden.safetensors"
    assert command("verify", finished / "block.py", "--record", golden, "--quiet").code == 0
    done = command("verify", finished / "block.onnx", "--against", golden, "--thorough")
    assert (done.code, "--thorough has no effect: the cases are those of" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("moe-export ver", "plain,verify"),
        ("moe-export verify --ag", "plain,--against"),
        ("moe-export model.py --ops", "plain,--opset"),
    ],
)
def test_a_shell_completes_words(env, words, found):
    asked = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "_MOE_EXPORT_COMPLETE": "bash_complete",
    }
    done = subprocess.run(
        [sys.executable, "-m", "moe_export"], env=env | asked, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == (found, "", 0)
