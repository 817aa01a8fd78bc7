from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from moe_train.cli import main
from moe_train.data.dataset import open_dataset
from moe_train.data.indexed import IndexedWriter
from moe_train.data.manifest import tokenizer_of
from moe_train.data.options import DataOptions
from moe_train.data.readers import WindowReader
from moe_train.data.sampling import Sampler
from moe_train.data.tokenizers import load_tokenizer
from moe_train.data.training_set import open_training_set
from tests.unit.commands.conftest import prepare_arguments


@pytest.mark.parametrize("again", [False, True])
def test_prepare_prints_what_it_wrote_and_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], again: bool
) -> None:
    """What is there already is said to be so; a file of it that is lost is written again."""
    if not again:
        for name in ("text.parquet", "m.model"):
            shutil.copy(folder / name, tmp_path)
        folder = tmp_path
    assert main(prepare_arguments(folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    if again:
        assert lines.pop(0) == "nothing was done: the result of this job is there already"
        assert main(prepare_arguments(folder, "--task", "1/2")) == 0
        assert capsys.readouterr().out == "nothing was done: the result of this job is there already\n"
    else:
        (folder / "out" / "train_text_document.bin").unlink()
        assert main(prepare_arguments(folder, "--task", "1/1")) == 0
        assert capsys.readouterr().out.startswith("task 1 of 1 is done")
        assert main(prepare_arguments(folder)) == 0
        assert capsys.readouterr().out.splitlines() == lines
    for split, line in zip(("train", "validation"), lines, strict=True):
        dataset = open_dataset(folder / "out" / split)
        assert line.startswith(f"{folder}/out/{split}: {len(dataset)} documents, {dataset.token_count:,} tokens")
        assert "1 empty" in line and "null" not in line


def test_changed_options_are_one_line_and_exit_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(prepare_arguments(folder, "--split-seed", "9")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "options.split_seed: 0 there, 9 now" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--output", "o"], "needs a SOURCE and --tokenizer MODEL, or --corpus stdlib or synthetic"),
        (["prepare", "x.parquet", "--corpus", "stdlib", "--output", "o"], "leave out SOURCE"),
        (["prepare", "--corpus", "stdlib", "--seed", "1", "--output", "o"], "--seed is for --corpus synthetic"),
        (["prepare", "--corpus", "synthetic", "--documents", "6", "--output", "o"], "a multiple of 4"),
        (["prepare", "x.parquet", "--output", "o", "--documents", "8"], "--documents is for --corpus synthetic"),
        (["prepare", "x.parquet", "--output", "o", "--tokenizer", "no.model"], "no.model does not exist"),
        (["tokenizer", "train", "x.parquet", "--output", "m.json"], "ends in .model"),
        (["tokenizer", "train", "x.parquet", "--output", "m.model"], "x.parquet does not exist"),
        (["tokenizer", "train", "x.parquet", "--output", "m.model", "--special-token", "a b"], "x.parquet does not"),
        (["tokenizer", "inspect", "no.model"], "no.model does not exist"),
        # Bytes of a command line that are no UTF-8.
        (
            ["tokenizer", "inspect", "no.model", "--text", "a\udcff"],
            "text of --text is not valid Unicode at character",
        ),
        (["tokenizer", "inspect", "no.model", "--eod-token", "\udcff"], "ends documents is not valid Unicode"),
        (["inspect", "no/prefix"], "there is no data set no/prefix"),
        (["inspect", "no/prefix"], "nor is there a folder no/prefix of a run or a checkpoint"),
        (["inspect", "no", "--sample", "3"], "nor is there a folder no of a run or a checkpoint"),
        (["inspect", "no", "--step", "3"], "there is no folder no; --step 3 is asked of the folder of a run"),
        (["inspect", ".", "--step", "3"], ". is no folder of a run (it holds no config.yaml), and --step 3 is asked"),
        (["inspect", ".", "--sample", "3"], "and --sample 3 is asked of one"),
        (["inspect", "."], "is a folder, not the name of a data set, and it holds no data set, run or checkpoint"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_train.data import corpus

    monkeypatch.setattr(corpus, "_modules", lambda root: [("m.py", f'"""{"Said twice. " * 50}"""\n')])
    assert main(["prepare", "--corpus", "stdlib", "--output", str(tmp_path / "c"), "--max-bytes", "100000"]) == 0
    assert "  topic: " in capsys.readouterr().out
    assert pq.read_table(tmp_path / "c/stdlib.parquet").num_rows > 10


def test_synthetic_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "--corpus", "synthetic", "--output", f"{tmp_path}/c", "--documents", "40", "--seed", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "seed 2" in lines[0] and [line.split(":")[0].strip() for line in lines[1:]] == [
        "finance",
        "legal",
        "code",
        "general",
    ]
    assert all(": 10 documents, " in line for line in lines[1:])
    assert pq.read_table(tmp_path / "c/synthetic.parquet").num_rows == 40


def test_tokenizer_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "inspect", str(folder / "m.model"), "--text", "router\n"]) == 0
    out = capsys.readouterr().out
    assert "tokens             300\n" in out and "special tokens     0 <unk>, 1 <|endoftext|>\n" in out
    assert out.rstrip().endswith(r"'\n'")


def test_tokenizer_train_and_measure(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All options of training; then the measurement, by the engine that preparation would take."""
    model, source = f"{tmp_path}/chat.model", f"{folder}/text.parquet"
    options = ["--special-token", "<|im_start|>", "--special-token", "<|im_end|>", "--model-type", "unigram"]
    options += ["--seed", "3", "--sample-bytes", "9000", "--character-coverage", "1.0", "--vocab-size", "290"]
    assert main(["tokenizer", "train", source, "--output", model, *options]) == 0
    capsys.readouterr()
    assert main(["tokenizer", "inspect", model, "--on", source]) == 0
    shown = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line.strip())
    shown = {name: value.strip() for name, value in shown.items()}
    assert shown["special tokens"] == "0 <unk>, 1 <|endoftext|>, 2 <|im_start|>, 3 <|im_end|>"
    assert shown["engine"] == "sentencepiece" and shown["measured on"].startswith("80 documents, ")
    texts = [text for text in pq.read_table(source).column("text").to_pylist() if text]
    ids = load_tokenizer(model).encode_batch(texts)
    tokens = sum(map(len, ids))
    assert shown["tokens per word"] == f"{tokens / sum(len(text.split()) for text in texts):.3f}"
    assert shown["tokens per document"] == f"{tokens / 80:.1f}"
    assert "gigatoken" in shown["encoded by"]


def test_inspect_overview(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{folder}/out/train"]) == 0
    out = capsys.readouterr().out
    assert "stored as uint16" in out and "domain prose" in out and "text.parquet" in out


def test_inspect_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{folder}/out/train", "--document", "2"]) == 0
    out = capsys.readouterr().out
    origin = pq.read_table(folder / "out/train.documents.parquet").to_pylist()[2]
    text = pq.read_table(folder / "text.parquet").to_pylist()[origin["row"]]["text"]
    assert f"{origin['id']} from text.parquet row {origin['row']}, domain prose" in out
    assert text in out
    assert main(["inspect", f"{folder}/out/train", "--document", "81"]) == 2


def test_inspect_writes_token_counts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "counts.json"
    assert main(["inspect", f"{folder}/out/train", "--token-counts", str(written)]) == 0
    counts = json.loads(written.read_text())
    assert f"among {sum(counts):,} tokens" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--token-counts", str(written)]) == 2


def test_inspect_sample_names_its_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{folder}/out/train", "--sample", "3", "--sequence-length", "200", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    dataset = open_dataset(folder / "out/train")
    start = 200 * Sampler(WindowReader(dataset, 200), seed=5).place(3)
    first, last = dataset.document_at(start), dataset.document_at(start + 200)
    assert last > first
    names = pq.read_table(folder / "out/train.documents.parquet").column("id").to_pylist()
    for index in range(len(dataset)):
        assert (f"  {names[index]} from" in out) == (first <= index <= last)


@pytest.mark.parametrize("pack", [False, True])
def test_inspect_sample_of_whole_documents(folder: Path, capsys: pytest.CaptureFixture[str], pack: bool) -> None:
    """As a run on this data set alone would read it."""
    name = f"{folder}/out/train"
    line = ["inspect", name, "--sample", "7", "--sampler", "documents", "--seed", "5", "--sequence-length", "500"]
    assert main([*line, *["--pack-documents"] * pack]) == 0
    out = capsys.readouterr().out
    options = DataOptions(train=name, sequence_length=500, sampler="documents", pack_documents=pack)
    batch = open_training_set(options, seed=5, batch_size=1, cache=folder, once=lambda work: work()).batch(7, 1)
    dataset, tokenizer = open_dataset(name), tokenizer_of(name)
    read: list[int] = []
    found = re.findall(r"^document (\d+), its tokens (\d+) to (\d+)$", out, re.MULTILINE)
    for document, first, last in found:
        begin = dataset.document_span(int(document))[0]
        tokens = dataset.read(begin + int(first), begin + int(last) + 1).tolist()
        assert tokenizer.decode(tokens) in out
        read += tokens[:-1]
    assert read == batch.ids_BS[0][~batch.padding_BS[0]].tolist()
    assert (len(found) > 1) == pack
    assert main(["inspect", name, "--sample", "0", "--pack-documents"]) == 2
    assert "--pack-documents belongs to --sampler documents" in capsys.readouterr().err
    assert main(["inspect", name, "--seed", "1"]) == 2
    assert "--seed: only for --sample" in capsys.readouterr().err


def test_inspect_data_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "p", 1000) as writer:
        writer.add([7, 8, 9])
    assert main(["inspect", f"{tmp_path}/p"]) == 0
    assert "no manifest" in capsys.readouterr().out
    assert main(["inspect", f"{tmp_path}/p", "--document", "0"]) == 0
    assert "7 8 9" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train.idx", "train.bin", "train_text_document", "train_text_document.bin"])
@pytest.mark.parametrize("arguments", [[], ["--document", "2"], ["--sample", "3"]])
def test_inspect_takes_the_name_of_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str]
) -> None:
    shown = []
    for path in ("train", name):
        assert main(["inspect", f"{folder}/out/{path}", *arguments]) == 0
        shown.append(re.sub(f"^{folder}/out/train[^ ]*:", "NAME:", capsys.readouterr().out))
    assert shown[0] == shown[1]


def test_inspect_a_folder_says_what_is_in_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{folder}/out"]) == 2
    assert f"did you mean {folder}/out/train or {folder}/out/validation?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prepare", "tokenizer", "inspect", "evaluate"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"  moe-train {command} " in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("prepare", ["--corpus", "--tokenizer"]), ("train_tokenizer", ["--vocab-size"]), ("inspect_data", ["--sample"])],
)
def test_scripts_call_the_commands(script: str, arguments: list[str]) -> None:
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, root / "tools" / f"{script}.py", "--help"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(argument in run.stdout for argument in arguments)
