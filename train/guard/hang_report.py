"""hang_report.txt: the verdict first, then one line a rank, then everyone's stacks."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.errors import HangError
from train.guard.verdict import Place, Verdict, spoken

logger = logging.getLogger(__name__)

REPORT = "hang_report.txt"
WRITE_SECONDS = 10
COLUMNS = ("rank", "host", "pid", "step", "phase", "s in phase", "s idle", "collectives", "waits", "state")


def hang_error(verdict: Verdict, places: Sequence[Place], seconds: float, report: str) -> HangError:
    """What the user sees.

    Args:
        verdict: of `places`.
        places: of all ranks, by rank.
        seconds: for which no rank has advanced.
        report: where the report is, or why there is none.
    """
    hosts = sorted({places[rank].member.host for rank in verdict.late})
    shown = ", ".join(hosts[:3]) + (", ..." if len(hosts) > 3 else "")
    where = f"{spoken(verdict.late)} ({shown})" if verdict.late else "the run"
    if not verdict.late:
        late = "hangs, and nothing shows which rank is late"
    elif verdict.certain or len(verdict.late) == 1:
        late = "late"
    else:
        late = "late, cannot tell between them"
    found = f"{late}: {verdict.text}. No rank has advanced for {seconds:.0f} s"
    remedy = f"{report} has every rank's stacks"
    if all(places[rank].silent is None for rank in verdict.late):
        remedy += "; guard.hang_timeout_seconds must be above the longest single phase"
    return HangError(where, found, remedy=remedy)


def render(verdict: Verdict, places: Sequence[Place], *, seconds: float, limit: float, by: int, faults: str) -> str:
    """The whole report.

    Args:
        verdict: of `places`.
        places: of all ranks, by rank.
        seconds: for which no rank has advanced.
        limit: after how many a verdict is due.
        by: the rank that writes.
        faults: what is wrong with the table by which the ranks hear of each other; empty where nothing is.
    """
    host = places[by].member.host
    late = spoken(verdict.late) if verdict.late else "no rank in particular"
    sure = "" if verdict.certain else " (cannot tell between them)" if len(verdict.late) > 1 else " (cannot tell)"
    rows = [COLUMNS, *(_row(place) for place in places)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    table = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    parts = [
        f"LATE: {late}{sure}",
        verdict.text,
        "",
        f"No rank had advanced for {seconds:.0f} s (a verdict is due after {limit:g} s). "
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, written by rank {by} on {host}.",
        *([f"The ranks' table: {faults}"] if faults else []),
        "",
        *table,
    ]
    for place in places:
        if place.account is not None:
            parts += ["", f"===== rank {place.rank}: {place.account.doing}", place.account.stacks.rstrip()]
    return "\n".join(parts) + "\n"


def _row(place: Place) -> tuple[str, ...]:
    sign, account = place.sign, place.account
    heard = f"not heard of for {place.silent:.0f} s" if place.silent is not None else ""
    ended = f"left: {sign.ended}" if sign.ended else ""
    return (
        str(place.rank),
        place.member.host,
        str(place.member.pid),
        str(sign.step),
        sign.phase,
        f"{sign.in_phase:.0f}",
        f"{place.idle:.0f}",
        "-" if account is None or account.collectives is None else "+".join(map(str, account.collectives)),
        "-" if account is None else account.waits.value,
        ", ".join(text for text in (place.state, heard, ended) if text) or "-",
    )


def publish(text: str, folder: Path, *, since: float, rank: int) -> Path | None:
    """Writes the report to the run's folder; where that does not take it, to the machine's for temporary files.

    Args:
        text: of the report.
        folder: of the run.
        since: `time.time` at which the attempt began.
        rank: that writes.

    Returns:
        The file; None where nothing took it, and the log has it.
    """
    done: list[Path] = []
    # A disk that hangs may be why the run does: it must not keep the run from ending.
    if within(WRITE_SECONDS, lambda: done.append(_write(text, folder, since, rank))):
        return done[0]
    if within(WRITE_SECONDS, lambda: done.append(_write_elsewhere(text))):
        return done[-1]
    logger.error("hang watch: no folder took the report, which reads:\n%s", text)
    return None


def _write(text: str, folder: Path, since: float, rank: int) -> Path:
    """Whole or not at all. A report of this attempt that is there already stays, ours goes beside it."""
    path = folder / REPORT
    if path.exists() and path.stat().st_mtime >= since:  # ranks that are cut off from each other judge apart
        path = path.with_stem(f"{path.stem}-rank{rank}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def _write_elsewhere(text: str) -> Path:
    handle, name = tempfile.mkstemp(prefix="crosstune-hang-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(name)


def within(seconds: float, work: Callable[[], object]) -> bool:
    """Does something that may block for ever, such as a write to a disk that hangs; whether it ended in time, well."""
    done: list[bool] = []

    def try_it() -> None:
        try:
            work()
            done.append(True)
        except Exception as error:
            logger.warning("hang watch: %s: %s", type(error).__name__, error)

    thread = threading.Thread(target=try_it, name="hang watch, at work", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)
