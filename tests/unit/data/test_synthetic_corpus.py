from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from moe_train.cli import main
from moe_train.data.split import split_position
from moe_train.data.synthetic import finance, general, legal, source_code
from moe_train.data.synthetic.corpus import DOMAINS, domain_rows, stratified_names, write_synthetic_corpus
from moe_train.data.synthetic.draw import Draw
from moe_train.data.synthetic.grammar import Writer
from moe_train.data.tokenizers import SentencePieceTokenizer
from tests.unit.data.test_corpus import FINEWEB

MODULES = {"finance": finance, "legal": legal, "code": source_code, "general": general}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_synthetic_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[dict]:
    return pq.read_table(corpus / "synthetic.parquet").to_pylist()


def test_columns_balance_and_facts(corpus: Path, rows: list[dict]) -> None:
    assert list(rows[0]) == FINEWEB
    assert Counter(row["dump"] for row in rows) == dict.fromkeys(("finance", "legal", "code", "general"), 1000)
    for name in ("text", "id", "url"):
        assert len({row[name] for row in rows}) == len(rows)
    facts = json.loads((corpus / "synthetic.json").read_text())
    for domain, counts in facts["domains"].items():
        texts = [row["text"] for row in rows if row["dump"] == domain]
        assert counts == {"documents": 1000, "bytes": sum(len(text.encode()) for text in texts)}
        assert 0.2 < counts["bytes"] / sum(other["bytes"] for other in facts["domains"].values()) < 0.33


def test_the_text_is_what_it_was(tmp_path: Path) -> None:
    """The same on every machine and Python version: Python 3.10 to 3.13 give this hash."""
    facts = write_synthetic_corpus(tmp_path, seed=3, documents=40)
    assert facts["content_sha256"] == "d5b4c52edceba11527cc560c1c15acf305ee1e946fa6ee42e5c58709024a09a2"


def test_no_order_of_hashing_enters(tmp_path: Path) -> None:
    code = "import sys; from moe_train.data.synthetic.corpus import *; write_synthetic_corpus(sys.argv[1], 5, 80)"
    for number in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / number],
            check=True,
            env={"PYTHONHASHSEED": number, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
    one, two = (tmp_path / number / "synthetic.parquet" for number in ("1", "2"))
    assert one.read_bytes() == two.read_bytes()


def test_seeds_differ_and_a_larger_corpus_begins_alike(tmp_path: Path) -> None:
    small, large, other = (list(domain_rows("legal", n, seed)) for n, seed in ((20, 1), (60, 1), (20, 2)))
    texts = [[row["text"] for row in some] for some in (small, large, other)]
    assert texts[1][:20] == texts[0] and not set(texts[0]) & set(texts[2])


def test_again_does_nothing_and_another_seed_replaces(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.parquet"
    first = write_synthetic_corpus(tmp_path, documents=8)
    before = path.stat()
    assert write_synthetic_corpus(tmp_path, documents=8) == first and path.stat() == before
    assert write_synthetic_corpus(tmp_path, seed=1, documents=8) != first and path.stat() != before
    with pytest.raises(ValueError, match="multiple of 4 domains, not 10"):
        write_synthetic_corpus(tmp_path, documents=10)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_listed_word_occurs(rows: list[dict], domain: str) -> None:
    text = "\n".join(row["text"] for row in rows if row["dump"] == domain).lower()
    entries = [entry for name, words in MODULES[domain].WORDS.items() if name != "roles" for entry in words]
    assert len(set(entries)) > 50
    assert [entry for entry in entries if entry.lower() not in text] == []
    assert all(role in text for pair in legal.WORDS["roles"] for role in pair.lower().split("/") if domain == "legal")
    assert not re.search(r"a\(n\)", text)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2])
def test_positions_of_the_groups_are_stratified(rows: list[dict], fraction: float) -> None:
    held_out = Counter(row["dump"] for row in rows if split_position(row["url"], 0) < fraction)
    assert held_out == dict.fromkeys(DOMAINS, round(1000 * fraction))


def test_preparation_splits_each_domain_alike(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """Validation has 7 % of each domain, and shares no text with training."""
    write_synthetic_corpus(tmp_path / "corpus", seed=4, documents=400)
    arguments = ["--output", f"{tmp_path}/out/", "--tokenizer", str(tokenizer.path), "--validation-fraction", "0.07"]
    assert main(["prepare", f"{tmp_path}/corpus", *arguments]) == 0
    sides = {
        side: pq.read_table(tmp_path / f"out/{side}.documents.parquet").to_pylist() for side in ("train", "validation")
    }
    for side, count in (("train", 93), ("validation", 7)):
        assert Counter(row["domain"] for row in sides[side]) == dict.fromkeys(DOMAINS, count)
    texts = {row["id"]: row["text"] for row in pq.read_table(tmp_path / "corpus/synthetic.parquet").to_pylist()}
    assert not {texts[row["id"]] for row in sides["train"]} & {texts[row["id"]] for row in sides["validation"]}


@pytest.mark.parametrize("count", [1, 37, 250])
def test_few_names_are_spread_too(count: int) -> None:
    names = list(stratified_names("x", count))
    below_half = sum(split_position(name, 0) < 0.5 for name in names)
    assert len(set(names)) == count and abs(below_half - count / 2) <= 1


def test_code_runs_and_its_assertions_hold() -> None:
    pools = 0
    for row in domain_rows("code", 60, 11):
        space: dict = {}
        exec(compile(row["text"], row["id"], "exec"), space)
        [test] = [value for name, value in space.items() if name.startswith("test_")]
        test()
        assert row["text"].count("    assert ") >= 1
        for pool in (value for name, value in space.items() if name.endswith("Pool")):
            pools += 1
            assert pool(1).push(3) and not pool(0).push(3)
    assert pools > 10


def test_figures_agree() -> None:
    """Revenue less costs is the profit; the parts of a fund add up; clauses refer to clauses that exist."""
    found = Counter[str]()
    for row in domain_rows("finance", 120, 12):
        text = row["text"]
        if "operating profit" in text:
            now, before, costs, profit = (
                int(x.replace(".", "")) for x in re.findall(r"([\d.]+) million dollars", text)[:4]
            )
            percent = re.search(r" by ([\d.]+) percent", text)
            assert percent and now - costs == profit
            assert int(percent[1].replace(".", "")) == abs(now - before) * 1000 // before
            found["results"] += 1
        elif "The fund is worth" in text:
            whole, *parts = map(int, re.findall(r"(\d+) million dollars", text))
            assert whole == sum(parts) and len(parts) == 3
            found["fund"] += 1
    for row in domain_rows("legal", 120, 12):
        number = re.search(r"under clause (\d+)|of section (\d+) is", row["text"])
        if number:
            wanted = number[1] or number[2]
            assert re.search(rf"^(Section )?{wanted}\. ", row["text"], re.MULTILINE)
            found["reference"] += 1
    assert min(found[name] for name in ("results", "fund", "reference")) > 10


def test_names_stay_through_a_document() -> None:
    stories = [row["text"] for row in domain_rows("general", 100, 13) if " lived near " in row["text"]]
    assert len(stories) > 10
    for text in stories:
        hero = text.split(" ")[0]
        last = text.strip().rpartition("\n")[2]
        assert f"{hero} carried the" in last
        thing = re.search(r"carried the (\w+) home,", last)
        assert thing and re.search(rf" {thing[1]}\.\n", text)


def test_grammar() -> None:
    writer = Writer({"x": ("apple {y}",), "y": ("pie",), "z": ("one", "two")}, Draw(1))
    assert writer.sentence("a(n) {x} and a(n) {y}") == "An apple pie and a pie"
    writer.fix_different("z", "first", "second")
    assert sorted(writer.fill("{first} {second}").split()) == ["one", "two"]
    writer.fix(y="tart")
    assert writer.fill("{x}") == "apple tart"


def test_draw_covers_its_range() -> None:
    draw = Draw("a", 1)
    assert {draw.between(3, 6) for _ in range(200)} == {3, 4, 5, 6}
    assert sorted(draw.some(range(9), 9)) == list(range(9))
    same, other = ([d.below(1000) for _ in range(5)] for d in (Draw("a", 1), Draw("a", 2)))
    assert same == [Draw("a", 1).below(1000), *same[1:]] and same != other
