"""The Python API on run folders that were never trained: weights from the seed, a tokenizer of bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_train.api import LoadedModel, load
from moe_train.checkpoint.slices import OwnedSlice, cut
from moe_train.checkpoint.streaming import write_weights
from moe_train.checkpoint.writing import lazy
from moe_train.data.options import DataOptions
from moe_train.data.tokenizers.sentencepiece_model import train_sentencepiece
from moe_train.model.moe_layer import moe_layers
from moe_train.parallel.groups import Groups
from moe_train.parallel.options import ParallelOptions
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, to_yaml
from tests.unit.evaluation.generation.conftest import BASE, build, groups

__all__ = ["groups"]
TEXT = "The quick brown fox jumps over the lazy dog; sphinx of black quartz, judge my vow. "
ROUTER = RouterOptions(balancing=BalancingOptions(bias=BiasOptions(rate=0.1)))
CONFIG = RunConfig(
    model=dataclasses.replace(BASE, vocab_size=320),
    router=ROUTER,
    parallel=ParallelOptions(expert=2),  # of the training; here one process holds all
    data=DataOptions(train="nowhere/train", validation="nowhere/validation", sequence_length=16),
    train=TrainOptions(global_batch_size=2, micro_batch_size=1),
)


def write_run(run_dir: Path, config: RunConfig = CONFIG, steps: tuple[int, ...] = (3, 7)) -> Path:
    """A run folder with a checkpoint per step, whose weights follow from the step."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    for step in steps:
        named = {**(model := build(config.model, config.router, seed=step)).state_dict()}
        named = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
        assert len(moe_layers(model)) == 3
        slices = [OwnedSlice(f"model.{name}", tuple(x.shape), 0, x.detach().reshape(-1)) for name, x in named.items()]
        boxes = [lazy(box) for owned in slices for box in cut(owned)]
        write_weights(run_dir / "checkpoints", step, boxes, {})
    return run_dir


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([TEXT * 3], path, 300)
    return path


@pytest.fixture(scope="module")
def run_dir(groups: Groups, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "made")
    shutil.copy(tokenizer_file, folder)
    return folder


@pytest.fixture(scope="module")
def model(run_dir: Path) -> Iterator[LoadedModel]:
    yield load(run_dir, device="cpu")


def test_the_latest_another_step_and_a_checkpoint_folder(run_dir: Path, model: LoadedModel) -> None:
    early = load(run_dir, step=3)
    assert (model.step, early.step) == (7, 3)
    same = load(run_dir / "checkpoints" / "step_00000003", device="cpu")
    ids = [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(early.logits(ids), same.logits(ids))
    assert not torch.allclose(early.logits(ids), model.logits(ids))
    assert model.logits(torch.tensor(ids)).shape == (2, 3, 320)


def test_weights_and_gate_state_are_those_of_the_checkpoint(model: LoadedModel) -> None:
    want = build(CONFIG.model, ROUTER, seed=7).state_dict()
    got = model.model.state_dict()
    tensors = {name: x for name, x in want.items() if isinstance(x, torch.Tensor)}
    assert sum(name.endswith("bias_E") for name in tensors) == 3
    assert all(torch.equal(got[name], x) for name, x in tensors.items())
    assert model.config.model == CONFIG.model and not model.model.training


def test_generate_and_stream(model: LoadedModel) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 2}
    texts = ["The quick", "", "sphinx"]
    found = model.generate(texts, **options)
    assert [c.prompt_tokens for c in found][1] == 1, "an empty prompt begins behind the end of a document"
    for text, completion in zip(texts, found, strict=True):
        # The model has more ids than the tokenizer, as published ones do; those have no text.
        assert completion.text == model.tokenizer.decode(token for token in completion.ids if token < 300)
        assert "".join(model.stream(text, **options)) == completion.text
        assert model.generate(text, **options) == [completion]
        assert model.generate(model.encode(text), **options) == [completion]
    stop = found[0].text[4]
    [cut] = model.generate(texts[0], **options, stop=stop)
    assert cut.text == found[0].text[: found[0].text.index(stop)]


def test_trace(model: LoadedModel) -> None:
    [one] = model.trace("The lazy dog")
    assert one.ids_S.tolist() == model.encode("The lazy dog")[0]
    assert [len(layer.experts(0)) for layer in one.layers] == [2, 2, 2]
    assert len(model.trace([[1, 2], [3, 4, 5]])) == 2


def test_ids_may_be_flat_and_of_any_kind(model: LoadedModel) -> None:
    """One prompt, as in `stream`; and tensors, arrays and their rows."""
    options = {"max_new_tokens": 3}
    ids = [1, 2, 3]
    want = model.generate([ids], **options)
    for given in (ids, tuple(ids), torch.tensor(ids), torch.tensor([ids]), [torch.tensor(ids)], np.array(ids)):
        assert model.encode(given) == [ids]  # type: ignore[arg-type]
        assert model.generate(given, **options) == want  # type: ignore[arg-type]
    assert "".join(model.stream(ids, **options)) == want[0].text
    [flat], [nested] = model.trace(ids), model.trace([ids])
    assert torch.equal(flat.layers[0].logits_SE, nested.layers[0].logits_SE)
    assert torch.equal(model.logits(ids), model.logits([ids]))
    assert model.generate([], **options) == [] == model.trace([])


@pytest.mark.parametrize("use", ["generate", "trace", "stream", "logits"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "0 has no token.*at least one"),
        ([320], r"0 holds an id outside of the model's vocabulary of 320 \(320; .* 0 to 319\)"),
        ([2, -1], r"0 holds an id outside .* \(-1;"),
        ([2, 1.0], "0 holds 1.0.*integers"),
        ([2, "a"], "0 holds 'a'.*integers"),
    ],
    ids=str,
)
def test_bad_ids(model: LoadedModel, use: str, ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^(prompt|sequence) {message}"):
        if use == "stream":
            list(model.stream(ids))
        else:
            getattr(model, use)([ids])


def test_what_is_no_prompt(model: LoadedModel) -> None:
    for use in (model.generate, model.trace, model.encode):
        with pytest.raises(ValueError, match="prompts are 5; give a text, texts, or lists of token ids"):
            use(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="prompt 1 is 2; .* list of token ids"):
            use([[1], 2])  # type: ignore[list-item]
    for several in (["a", "b"], [[1, 2]], [[1], [2]]):
        with pytest.raises(ValueError, match="stream continues one prompt: give one text or one list of token ids"):
            model.stream(several)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give at least one sequence"):
        model.logits(torch.zeros(0, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequences of 1 to 2 ids; .* as many"):
        model.logits([[1], [1, 2]])
    with pytest.raises(ValueError, match="give token ids"):
        model.logits("text")  # type: ignore[arg-type]


def test_stop_strings(model: LoadedModel) -> None:
    plain = model.generate([[1, 2]], max_new_tokens=2)
    assert model.generate([[1, 2]], max_new_tokens=2, stop=None) == plain
    assert model.generate([[1, 2]], max_new_tokens=2, stop=[]) == plain
    for stop in (5, [5], [None], ["a", b"b"]):
        with pytest.raises(ValueError, match="stop.* must be text"):
            model.generate([[1, 2]], stop=stop)


def test_bfloat16(run_dir: Path, model: LoadedModel) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        low = load(run_dir, dtype=dtype)
        assert low.logits([[1, 2]]).dtype == torch.bfloat16
        assert all(layer.router.bias_E.dtype == torch.float32 for layer in moe_layers(low.model))
    with pytest.raises(ValueError, match="precision is 'int8'; known are float32, bfloat16"):
        load(run_dir, dtype="int8")


def test_without_a_tokenizer_ids_still_work(groups: Groups, tmp_path: Path) -> None:
    model = load(write_run(tmp_path / "run", steps=(1,)))
    [completion] = model.generate([[5, 6]], max_new_tokens=4)
    assert len(completion.ids) == 4 and completion.text == ""
    for use in (model.generate, model.trace, model.encode):
        with pytest.raises(ValueError, match="no tokenizer is known .*nowhere/train.manifest.json.*--tokenizer"):
            use("text")
    with pytest.raises(ValueError, match="as texts or all as token ids"):
        model.generate(["a", [1]])  # type: ignore[list-item]


def test_a_given_tokenizer(groups: Groups, tokenizer_file: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(CONFIG, model=dataclasses.replace(BASE, vocab_size=290))
    model = load(write_run(tmp_path / "small", small, steps=(1,)), tokenizer=tokenizer_file)
    with pytest.raises(ValueError, match="has 300 ids, the model only 290"):
        model.generate("text")
    fits = load(write_run(tmp_path / "fits", steps=(1,)), tokenizer=tokenizer_file.parent)
    assert fits.tokenizer.path == tokenizer_file
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "fits", tokenizer=tmp_path / "gone.model").generate([[1]])


def test_ends_of_an_imported_model(run_dir: Path, model: LoadedModel, tmp_path: Path) -> None:
    """generation_config.json may name several ids that end a text."""
    imported = tmp_path / "imported"
    shutil.copytree(run_dir, imported)
    (imported / "hf").mkdir()
    options = {"max_new_tokens": 20, "temperature": 2.0}
    free = model.generate("The", **options)[0].ids
    (imported / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [318, free[5]]}))
    [ended] = load(imported).generate("The", **options)
    assert (ended.ids, ended.finish) == (free[: free.index(free[5]) + 1], "end")


def test_bad_paths(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no .*nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="neither a run folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint .*step_00000005.*step_00000003, step_00000007"):
        load(run_dir, step=5)
    with pytest.raises(ValueError, match="one checkpoint already"):
        load(run_dir / "checkpoints" / "step_00000003", step=3)
    shutil.copytree(run_dir / "checkpoints" / "step_00000003", tmp_path / "alone" / "step_00000003")
    with pytest.raises(ValueError, match="outside of a run folder"):
        load(tmp_path / "alone" / "step_00000003")


@pytest.mark.slow
def test_the_api_is_cheap_to_import_and_needs_no_launcher(run_dir: Path) -> None:
    """In a process of its own, whatever a launcher has left in the environment: two models, and sound groups."""
    code = f"""
import os, sys
os.environ |= {{"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "0"}}
before = dict(os.environ)
import moe_train.api
assert not {{"torch", "numpy", "megatron", "deepspeed"}} & set(sys.modules)
first = moe_train.api.load({str(run_dir)!r}, device="cpu")
second = moe_train.api.load({str(run_dir)!r}, device="cpu", step=3)
a, b, c = (m.generate("The", max_new_tokens=3)[0].ids for m in (first, second, first))
assert a == c and dict(os.environ) == before
import torch, torch.distributed as dist
assert dist.get_world_size() == 1
x = torch.ones(2)
dist.all_reduce(x)
dist.barrier()
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
assert initialize(ParallelOptions()).data_size == 1
assert first.generate("The", max_new_tokens=3)[0].ids == a
print("done")
"""
    result = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr
    assert result.stderr == ""
