"""Groups of rows, measured in a process apart: what fails, crashes or hangs costs no other group.

After an error on a GPU every later call of the process fails as well, and a kernel that waits for
ever can only be ended with its process. So the process that measures is replaced where it must be.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection

from benchmarks.comparisons import absent
from benchmarks.records import Row

Group = Callable[[], Iterator[Row]]

PATIENCE = 90.0
"""Seconds that a row may take, and that a process may to begin."""


def isolated(
    groups: Mapping[str, Group], check: Callable[[], object], *, patience: float = PATIENCE
) -> Iterator[Row]:
    """The rows of all groups, as they come.

    Parameters
    ----------
    groups : mapping from name to function
        Each gives its rows. What cannot be measured becomes a row that says why.
    check : function
        Called after each group; where it raises, a new process does the rest.
    patience : float
        Seconds within which a row must come.
    """
    context = multiprocessing.get_context("spawn")
    left = dict(groups)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(left, check, sender), daemon=True)
        process.start()
        sender.close()
        try:
            if not receiver.poll(PATIENCE):  # that it has begun, with torch to import
                yield _missing(next(iter(left)), f"its process did not begin in {PATIENCE:g} s")
                return
            receiver.recv()
            while left:
                name = next(iter(left))
                if not receiver.poll(patience):
                    yield _missing(name, f"no row within {patience:g} s")
                    del left[name]
                    break
                row = receiver.recv()
                if row is None:
                    del left[name]
                else:
                    yield row
        except EOFError:
            process.join()
            if process.exitcode != 0:
                name = next(iter(left))
                yield _missing(name, f"its process ended with exit code {process.exitcode}")
                del left[name]
        finally:
            process.kill()
            process.join()


def _measure(groups: Mapping[str, Group], check: Callable[[], object], sender: Connection) -> None:
    """Send that this has begun; the rows of each group, and None after its last."""
    sender.send(True)
    for name, group in groups.items():
        for row in guarded(name, group):
            sender.send(row)
        sender.send(None)
        try:
            check()
        except Exception as error:
            print(f"  the process is replaced: {error!r}"[:300], flush=True)
            return


def guarded(name: str, group: Group) -> Iterator[Row]:
    """The rows of a group, told as they come, up to one that fails, which becomes why it did."""
    rows = group()
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            yield _missing(name, f"failed: {error!r}"[:300])
            return
        print(_line(row), flush=True)
        yield row


def _missing(name: str, reason: str) -> Row:
    print(f"  {name}: {reason}", flush=True)
    return absent(name, "what is left of it", reason)


def _line(row: Row) -> str:
    """A row while others are still being measured."""
    if "ours" in row:
        median, ratio = row["ours"]["median"], row["ratio"]
        return f"  {row['what']}: {median:.4g} {row['unit']}, {ratio:.3g} x {row['peer']}"
    return "  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items())


def _short(value: object) -> object:
    """Of many timings their median."""
    return f"{value['median']:.4g}" if isinstance(value, dict) and "median" in value else value
