"""Infers the type of a data source from its name."""

from __future__ import annotations

import logging
import os

from training.data.messages import quote, shorten
from training.data.shards.lists import SHARD_ENDINGS, is_list
from training.params.checks import CSV_NAME, SHARD_NAME
from training.params.options import DATASET_TYPES

logger = logging.getLogger(__name__)


def dataset_type_of(path: str | None, dataset_type: str) -> str:
    """Return the type of a source: the one that its name implies, or `dataset_type` if the name implies none.

    So training and validation data may have different types. Names that end in .tar or start with `pipe:` are
    webdataset; .csv and .tsv are csv. A folder is imagefolder if it has folders with files in them, and webdataset if
    it has .tar files. With "auto", braces, `::`, .txt and .list are webdataset.

    Raises:
        ValueError: the type is unknown, or is "auto" and the name implies none.
    """
    choices = ", ".join(DATASET_TYPES)
    if dataset_type not in DATASET_TYPES:
        raise ValueError(f"Unknown --dataset-type {quote(dataset_type)}: choose one of {choices}.")
    source = path or ""
    types = _types_of_name(source)
    if types and dataset_type not in types:
        if dataset_type != "auto":
            logger.info("%s: the name says that this is %s data, not %s.", shorten(source), types[0], dataset_type)
        return types[0]
    if dataset_type != "auto":
        return dataset_type
    if "::" in source or ("{" in source and "}" in source) or is_list(source):
        return "webdataset"
    if source and os.path.isdir(source):
        return "imagefolder"
    raise ValueError(
        f"The type of the data cannot be inferred from {path if path is None else quote(path)} (webdataset: .tar, "
        "braces or a .txt list; csv: .csv, .tsv; imagefolder: an existing folder). Set --dataset-type to one of "
        f"{choices}."
    )


def _types_of_name(source: str) -> tuple[str, ...]:
    """Return the types that a name clearly implies, the likeliest first."""
    if source.startswith("pipe:") or SHARD_NAME.search(source):
        return ("webdataset",)
    if "::" in source or "{" in source:
        return ()
    if CSV_NAME.search(source):
        return ("csv",)
    if not os.path.isdir(source):
        return ()
    with os.scandir(source) as scan:
        entries = [entry for entry in scan if not entry.name.startswith((".", "_"))]
    found = ["imagefolder"] if any(entry.is_dir() and os.listdir(entry) for entry in entries) else []
    return (*found, "webdataset") if any(entry.name.endswith(SHARD_ENDINGS) for entry in entries) else tuple(found)
