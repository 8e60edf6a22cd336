"""`--force`, of every command that writes a file."""

from __future__ import annotations

import click

force_option = click.option(
    "--force", is_flag=True, help="Overwrite files that moe-export did not write, and inputs."
)
