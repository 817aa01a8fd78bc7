"""A corpus of four domains (finance, legal, code, general) as parquet, for measuring specialisation by domain.

Every document is fixed by (seed, domain, number). Columns are FineWeb's; `dump` holds the domain and `url` the group,
one per document. The groups' names are chosen so that the split by a hash of `url` (split seed 0, the default) is
stratified: of each domain the same share falls on either side, for any fraction in whole percents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_train.data.files import partial_path, publish
from moe_train.data.split import split_position
from moe_train.data.synthetic import finance, general, legal, source_code
from moe_train.data.synthetic.draw import Draw

CORPUS_FILE = "synthetic.parquet"
DOMAINS: dict[str, Callable[[Draw], str]] = {
    "finance": finance.document,
    "legal": legal.document,
    "code": source_code.document,
    "general": general.document,
}
STRATA = 100
_ROW_GROUP = 256
_FORMAT = 2
"""Another number where the same seed gives other text."""


def write_synthetic_corpus(output: str | Path, seed: int = 0, documents: int = 4000) -> dict[str, Any]:
    """Writes OUTPUT/synthetic.parquet and OUTPUT/synthetic.json unless they are there and up to date.

    documents: of all domains together; each has a quarter of them.
    Returns the content of the JSON file: hash of ids and texts, seed, documents and bytes by domain.
    Errors: ValueError for a number of documents that is no multiple of four.
    """
    if documents < len(DOMAINS) or documents % len(DOMAINS):
        raise ValueError(f"the number of documents must be a multiple of {len(DOMAINS)} domains, not {documents}")
    rows = [row for domain in DOMAINS for row in domain_rows(domain, documents // len(DOMAINS), seed)]
    facts = _facts(rows, seed)
    parquet = Path(output) / CORPUS_FILE
    side = parquet.with_suffix(".json")
    if parquet.is_file() and side.is_file() and json.loads(side.read_text()) == facts:
        return facts
    parquet.parent.mkdir(parents=True, exist_ok=True)
    _write_parquet(partial_path(parquet), rows)
    partial_path(side).write_text(json.dumps(facts, indent=2) + "\n")
    publish([parquet, side])
    return facts


def domain_rows(domain: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """``count`` rows with `text`, `id`, `dump` and `url`; no text occurs twice."""
    write = DOMAINS[domain]
    names = stratified_names(f"synthetic:{domain}/", count)
    seen: set[str] = set()
    number = 0
    while len(seen) < count:
        text = write(Draw(seed, domain, number))
        if text not in seen:
            seen.add(text)
            yield {"text": text, "id": f"{domain}/{number}", "dump": domain, "url": next(names)}
        number += 1


def stratified_names(prefix: str, count: int) -> Iterator[str]:
    """``count`` different names whose split positions are spread evenly: each of `STRATA` parts of [0, 1) gets
    count / STRATA of them, rounded up or down; the parts that get one more are spread evenly too."""
    room = [(stratum + 1) * count // STRATA - stratum * count // STRATA for stratum in range(STRATA)]
    candidate = 0
    while any(room):
        name = f"{prefix}{candidate}"
        stratum = int(split_position(name, 0) * STRATA)
        if room[stratum]:
            room[stratum] -= 1
            yield name
        candidate += 1


def _facts(rows: list[dict[str, str]], seed: int) -> dict[str, Any]:
    content = hashlib.sha256()
    domains = {domain: {"documents": 0, "bytes": 0} for domain in DOMAINS}
    for row in rows:
        text = row["text"].encode()
        content.update(f"{row['id']}\0{row['url']}\0{len(text)}\0".encode() + text)
        domains[row["dump"]]["documents"] += 1
        domains[row["dump"]]["bytes"] += len(text)
    return {
        "corpus": "synthetic",
        "format": _FORMAT,
        "seed": seed,
        "content_sha256": content.hexdigest(),
        "domains": domains,
    }


def _write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        **{name: pa.array([row[name] for row in rows], pa.string()) for name in ("text", "id", "dump", "url")},
        "date": pa.array([""] * len(rows), pa.string()),
        "file_path": pa.array([row["id"] for row in rows], pa.string()),
        "language": pa.array(["en"] * len(rows), pa.string()),
        "language_score": pa.array([1.0] * len(rows), pa.float64()),
        # FineWeb counts GPT-2 tokens; no tokenizer is needed here, so these are words.
        "token_count": pa.array([len(row["text"].split()) for row in rows], pa.int64()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=_ROW_GROUP)
