"""Upcycled checkpoints under every layout (pitfalls row 42), also from several files."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from moe_train.interop.upcycle import UpcycleOptions
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from moe_train.training.convert import export_model, import_model
from moe_train.training.upcycle import upcycle_model
from tests.distributed.harness import interop
from tests.distributed.harness.expected import Processes
from tests.reference import hub

CASES = {
    "copies": ("qwen3", UpcycleOptions(8), "softmax_topk", {"top_k": 2}),
    "slices, shared, mixed": ("llama3_tied_heads_bf16", UpcycleOptions(8, 4, 8, [0, 2]), "softmax_topk", {"top_k": 4}),
    "slices x 5": ("qwen3_tied_bf16", UpcycleOptions(20, 5), "softmax_topk", {"top_k": 5}),
    "copies x 0.4": ("qwen3_tied_bf16", UpcycleOptions(8), "sigmoid_topk", {"top_k": 3, "scaling": 2.5}),
}


def upcycled(folder: Path, case: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The run's folder, ids, and the dense model's logits by transformers."""
    name, options, gate, values = CASES[case]
    # Not a fresh one: rounding leaves differences up to half of the bound, now and then more.
    seed = zlib.crc32(case.encode())
    hub.make(folder / "hub", hub.MODELS[name], seed)
    import_model(folder / "hub", folder / "dense")
    router = RouterOptions(gate, values, BalancingOptions(bias=BiasOptions(rate=0.001)))
    upcycle_model(folder / "dense", folder / "experts", router, options)
    ids_BS = torch.randint(hub.VOCAB, (3, hub.LENGTH), generator=torch.Generator().manual_seed(seed))
    return folder / "experts", ids_BS, hub.logits(folder / "hub", ids_BS)


@pytest.mark.parametrize("case", CASES)
def test_every_layout_begins_with_the_dense_output(processes: Processes, tmp_path: Path, case: str) -> None:
    run, ids_BS, want = upcycled(tmp_path, case)
    # Down projections of bfloat16 stay exact: multiplied by a power of two, or stored in float32.
    for expert in (1, 2, 4):
        for got in processes(expert).run(interop.logits, run=str(run), ids_BS=ids_BS, expert=expert):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_was_upcycled_is_exported(tmp_path: Path, case: str) -> None:
    """By its own modelling file: the stock class has no place for the bias. Every tensor keeps its type."""
    run, ids_BS, want = upcycled(tmp_path, case)
    report = export_model(run, tmp_path / "out", shard_bytes=50_000)
    assert any("selection bias" in note for note in report.notes)
    torch.testing.assert_close(hub.logits(tmp_path / "out", ids_BS, custom=True), want, rtol=0, atol=1e-5)
    assert not (run / "hf" / "import.json").exists(), "which says how the dense tensors came"
    assert hub.tensors(tmp_path / "out")["model.embed_tokens.weight"].dtype == hub.MODELS[CASES[case][0]].dtype


def test_what_the_dense_model_came_with_is_exported(tmp_path: Path) -> None:
    shape = hub.MODELS["qwen3"].config | {"max_position_embeddings": 32768, "eos_token_id": [2, 3], "bos_token_id": 1}
    hub.make(tmp_path / "hub", hub.Hub("Qwen3", shape), seed=1)
    (tmp_path / "hub" / "LICENSE").write_text("free")
    import_model(tmp_path / "hub", tmp_path / "dense")
    (tmp_path / "dense" / "hf" / "origin.json").write_text("{}")  # as in a run that was trained from there
    upcycle_model(tmp_path / "dense", tmp_path / "experts", RouterOptions(options={"top_k": 2}), UpcycleOptions(4))
    assert (tmp_path / "experts" / "hf" / "origin.json").exists(), "by which prompts begin as in the training"
    export_model(tmp_path / "experts", tmp_path / "out", shard_bytes=10**9)
    assert not (tmp_path / "out" / "origin.json").exists()
    content = hub.compared_config(tmp_path / "out")
    assert content["max_position_embeddings"] == 32768
    assert content["eos_token_id"] == [2, 3] and content["bos_token_id"] == 1
    for name in ("LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()


def test_it_replaces_only_what_it_wrote(tmp_path: Path) -> None:
    run, _, _ = upcycled(tmp_path, "copies")
    router, options = RouterOptions("softmax_topk", {"top_k": 2}), UpcycleOptions(4)
    with pytest.raises(ValueError, match="exists already"):
        upcycle_model(tmp_path / "dense", run, router, options)
    upcycle_model(tmp_path / "dense", run, router, options, force=True)
    with pytest.raises(ValueError, match="is not an upcycled model"):
        upcycle_model(tmp_path / "dense", tmp_path / "dense", router, options, force=True)
    with pytest.raises(ValueError, match="only a dense model can be upcycled"):
        upcycle_model(run, tmp_path / "again", router, options)
