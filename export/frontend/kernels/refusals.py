"""Refusals of what has no form outside of a GPU kernel."""

from __future__ import annotations

from typing import Any

from moe_export.errors import Code, NotExportableError


def refuse_arguments(kernel: str, **arguments: Any) -> None:
    """Refuse arguments that only make sense for packed sequences, or for devices that share the work.

    Raises:
        NotExportableError: One of them is given.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotExportableError(
                f"{kernel}({name}=...) has no form outside of the GPU kernel",
                code=Code.KERNEL,
                hint=f"export the model with {name} left at its default: one sequence a row",
            )


class MissingKernel:
    """A name of a kernel package that has no form here: it can be imported, and is refused when it is used."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def _refuse(self) -> NotExportableError:
        return NotExportableError(
            f"{self.name} is a GPU kernel that has no form in plain PyTorch here",
            code=Code.KERNEL,
            hint="docs/recurrence.md lists those that have; write its computation with PyTorch's operators",
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refuse()
