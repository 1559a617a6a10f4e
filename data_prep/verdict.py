"""Whether a preparation could succeed, judged by the first rows of its sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from configs.errors import CrosstuneError, DataError
from configs.schema.dataset import FilesDatasetConfig
from configs.schema.roots import PrepConfig
from data_prep.outlook import Outlook
from data_prep.records import Reject
from data_prep.rejects import remedy_for


def faults_of(cfg: PrepConfig, outlooks: Sequence[Outlook], splits: Mapping[str, float]) -> list[CrosstuneError]:
    """Why it would certainly stop. `splits`: rows of each split, those without any left out."""
    where = cfg.dataset.path if isinstance(cfg.dataset, FilesDatasetConfig) else cfg.dataset.name
    read = sum(each.read for each in outlooks)
    if not read:
        return [DataError(where, "holds no records at all")]
    rejects = [reject for each in outlooks for reject in each.rejects]
    if not splits:
        found = f"none of the {read:,} rows read can be used; the first:\n{_first(rejects)}"
        return [DataError(where, found, remedy=_remedy(rejects))]
    faults: list[CrosstuneError] = []
    if "train" not in splits:
        faults.append(DataError(where, f"no record is left for training; there are {', '.join(splits)}"))
    kinds = sorted({kind for each in outlooks for kind in each.kinds})
    if len(kinds) > 1:
        faults.append(
            DataError(
                where,
                f"holds {' and '.join(kinds)}; a folder of prepared data holds one kind",
                remedy="prepare them apart; dataset.preference=chosen makes samples of pairs",
            )
        )
    at_fault = [reject for reject in rejects if reject.counts]
    if 0 <= cfg.dataset.max_rejects < len(at_fault):
        faults.append(
            DataError(
                where,
                f"more than dataset.max_rejects={cfg.dataset.max_rejects} rows are at fault; the first:\n"
                f"{_first(at_fault)}",
                remedy=f"{_remedy(at_fault) or 'mend the rows'}; or raise dataset.max_rejects (-1: no limit)",
            )
        )
    return faults


def _remedy(rejects: Sequence[Reject]) -> str | None:
    return remedy_for(dict(Counter(reject.reason for reject in rejects).most_common()))


def _first(rejects: Sequence[Reject]) -> str:
    return "\n".join(f"    {reject}" for reject in rejects[:5])


def doubts_of(cfg: PrepConfig, outlooks: Sequence[Outlook]) -> list[str]:
    """What would probably go wrong."""
    doubts = [
        f"{each.preview.source.path}: none of the {each.read:,} rows read can be used"
        for each in outlooks
        if each.read and not each.kept
    ]
    now = sum(reject.counts for each in outlooks for reject in each.rejects)
    expected = sum(sum(reject.counts for reject in each.rejects) * each.factor for each in outlooks)
    if now <= cfg.dataset.max_rejects < expected:
        doubts.append(
            f"about {expected:,.0f} rows of the whole would be at fault, above dataset.max_rejects="
            f"{cfg.dataset.max_rejects}, at which a preparation stops"
        )
    return doubts


def untold_of(cfg: PrepConfig, outlooks: Sequence[Outlook], splits: Mapping[str, float]) -> list[str]:
    """What the first rows cannot tell."""
    untold = [] if all(each.is_whole for each in outlooks) else ["faults and lengths of later rows"]
    if cfg.dedup.exact or cfg.dedup.near:
        untold.append("how many rows are duplicates")
    if splits.keys() - {each.preview.split for each in outlooks} - {"train"}:
        untold.append("which rows are held out")
    return untold
