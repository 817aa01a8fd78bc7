"""metrics.csv: one row per record, one column per tag, for spreadsheets."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from moe_train.data.files import write_atomically
from moe_train.training.callbacks.appended import Appended
from moe_train.training.callbacks.base import Callback, Record, RunInfo, write_error
from moe_train.training.callbacks.tags import scalar_tags

Row = dict[str, str]


class CsvWriter(Callback):
    """Columns kind, step and the tags seen so far. A tag that appears later adds a column: the file is then written
    anew with empty cells above. On resume, later rows are removed as in metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = ["kind", "step"]
        self._lines = Appended(path)

    def on_start(self, run: RunInfo) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [row for row in self._read() if row["step"].isdigit() and int(row["step"]) <= run.start_step]
            self._rewrite(rows, self._columns)
        except OSError as error:
            raise write_error(self.path, error) from None

    def on_record(self, record: Record) -> None:
        row = {"kind": str(record["kind"]), "step": str(record["step"])}
        row |= {tag: repr(value) for tag, value in scalar_tags(record).items()}
        new = [column for column in row if column not in self._columns]
        try:
            if new:
                rows = self._read()
                self._rewrite(rows, list(dict.fromkeys([*self._columns, *new])))
            self._lines.append(_format([row], self._columns).encode())
        except OSError as error:
            raise write_error(self.path, error) from None

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        complete = self.path.read_text(encoding="utf-8").rpartition("\n")[0]  # without a row cut short by a crash
        reader = csv.DictReader(io.StringIO(complete), restval="")
        rows = [{key: value for key, value in row.items() if key} for row in reader]
        self._columns = list(dict.fromkeys([*self._columns, *(reader.fieldnames or [])]))
        return rows

    def _rewrite(self, rows: list[Row], columns: list[str]) -> None:
        header = {column: column for column in columns}
        write_atomically(self.path, _format([header, *rows], columns).encode())
        self._columns, self._lines = columns, Appended(self.path)


def _format(rows: list[Row], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
