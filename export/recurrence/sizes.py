"""`rows`: the lengths at which a model is traced, from which the numbers in it are known at every length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.lengths import Length, chunk_of
from moe_export.export.tracing.trace import quiet

# Short, so that tracing is quick; not evenly spaced, so that rounded lengths show; long enough for three iterations of
# a loop with a stride. A second length grows in other steps than the first, so that a number follows only one of them.
_TRACED = ((6, 7, 9), (15, 16, 18, 21), (24, 32, 48), (64, 128, 192, 256))
_SECOND = ((7, 9, 10), (16, 19, 21, 22), (32, 48, 56), (64, 192, 256, 448))


def rows(
    subject: Subject, lengths: Sequence[Length]
) -> Iterator[tuple[Sequence[tuple[int, ...]], int | None]]:
    """The lengths to trace at, one row of sizes after the other, each with the chunk size it is meant for, if any.

    Args:
        subject: The model.
        lengths: One or two lengths that are looped over; each row has a size for each of them.
    """
    first, *further = (
        tuple(zip(*columns[: len(lengths)], strict=True)) for columns in zip(_TRACED, _SECOND, strict=True)
    )
    yield first, None
    if len(lengths) == 1:
        with quiet():
            chunk = chunk_of(subject, lengths[0])
        if chunk is not None:
            # The last chunk begun, half full, full and nearly full; then without the full one: a model may pad only
            # where it is not.
            for less in (0, 1):
                sizes = (3 * chunk + 1, 4 * chunk + chunk // 2, 6 * chunk - less, 8 * chunk - 1)
                yield tuple((size,) for size in sizes), chunk
            # A model may take whole chunks only; a trace keeps of the last one what is used.
            yield tuple((chunk * count,) for count in (4, 5, 7, 8)), chunk
    for row in further:
        yield row, None
