"""Models of every family from the hub and back, against transformers.

Pitfall 21: KempnerForge#202, DS#6589, pith-train PR89 (experts of one rank only). Pitfall 22: M#5844/PR5845 (experts
left random), MB#1716/#1871/#1210, FlagScale#1185 (export under expert parallelism). Pitfall 13: FlagScale PR412,
ms-swift#6793 (the bias does not travel).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.store import checkpoint_at
from moe_train.data.options import DataOptions
from moe_train.training.convert import export_model, import_model
from moe_train.training.origin import carry_origin
from tests.distributed.harness import interop
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.selection import every_second
from tests.reference import hub

WITH_EXPERTS = [name for name in hub.MODELS if not name.startswith(("qwen3_tied", "llama3")) and name != "qwen3"]
SHARD = 5 * 10**9


@pytest.fixture(scope="module")
def seed() -> int:
    """One for all: of fresh ones some percent meet a token whose experts are chosen by the last bit of a score, and
    then both sides are right with different logits."""
    return 20261122


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, seed: int):
    """``imported(name)``: the folder as transformers wrote it, and ours."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            hub.make(folder / "hub", hub.MODELS[name], seed)
            import_model(folder / "hub", folder / "ours")
            made[name] = folder / "hub", folder / "ours"
        return made[name]

    return get


def ids(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(hub.VOCAB, (3, hub.LENGTH), generator=generator)


@pytest.mark.parametrize("name", hub.MODELS)
def test_logits_are_those_of_transformers(processes: Processes, imported, seed: int, name: str) -> None:
    folder, run = imported(name)
    want = hub.logits(folder, ids(seed))
    assert want.std() > 0.3
    got = processes(1).run(interop.logits, run=str(run), ids_BS=ids(seed), expert=1)[0]
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", hub.MODELS)
def test_a_round_trip_gives_the_same_bytes(imported, tmp_path: Path, name: str) -> None:
    folder, run = imported(name)
    export_model(run, tmp_path / "back", shard_bytes=40_000)
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), hub.tensors(folder))
    assert hub.compared_config(tmp_path / "back") == hub.compared_config(folder) | {"_name_or_path": ANY}


class _Any(str):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


ANY = _Any()


@pytest.mark.parametrize("name", hub.MODELS)
def test_names_and_shapes_are_the_models_own(processes: Processes, imported, name: str) -> None:
    from moe_train.interop.shapes import weight_shapes
    from moe_train.training.run_folder import load

    _, run = imported(name)
    config = load(run)
    got = {key: tuple(shape) for key, shape in weight_shapes(config.model, config.router).items()}
    want = processes(1).run(interop.names_and_shapes, run=str(run))[0]
    assert got == want


@pytest.mark.parametrize(("name", "expert"), every_second(WITH_EXPERTS, [2, 4]))
def test_expert_parallel_layouts_load_it(processes: Processes, imported, seed: int, name: str, expert: int) -> None:
    folder, run = imported(name)
    want = hub.logits(folder, ids(seed))
    for got in processes(expert).run(interop.logits, run=str(run), ids_BS=ids(seed), expert=expert):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", every_second(hub.MODELS))
def test_generation_is_that_of_transformers(processes: Processes, imported, seed: int, name: str) -> None:
    """Greedy, by one process and with the experts on two ranks, wherever the chosen token leads by 1e-4."""
    folder, run = imported(name)
    prompts = [ids(seed)[row, :length].tolist() for row, length in enumerate((3, 11, 6))]
    want, certain = hub.greedy(folder, prompts, count=8)
    assert sum(certain) >= 12
    for expert in (1, 2) if name in WITH_EXPERTS else (1,):
        for got in processes(expert).run(interop.greedy, run=str(run), prompts=prompts, expert=expert, count=8):
            for mine, theirs, length in zip(got, want, certain, strict=True):
                assert mine[:length] == theirs[:length]


@pytest.mark.parametrize(
    ("name", "expert", "zero", "precision"),
    [
        ("mixtral", 1, 1, "float32"),
        ("mixtral", 4, 2, "float32"),
        ("qwen3_moe_sparse_step_bf16_shards", 2, 3, "bfloat16"),
        ("qwen3_moe_tied_mixed_yarn", 2, 1, "float32"),
        ("olmoe", 4, 3, "float32"),
        ("deepseek_v3", 2, 2, "float32"),
        ("deepseek_v3_yarn_bf16", 4, 1, "bfloat16"),
        ("llama3_tied_heads_bf16", 1, 2, "bfloat16"),
    ],
)
def test_a_run_that_began_with_it_exports_it_again(
    processes: Processes,
    imported,
    tmp_path: Path,
    seed: int,
    name: str,
    expert: int,
    zero: int,
    precision: str,
) -> None:
    """From checkpoints that any layout wrote: cut into the slices of ZeRO, experts on several ranks."""
    folder, run = imported(name)
    root = tmp_path / "run" / "checkpoints"
    processes(max(2, expert)).run(
        interop.begin_and_save, run=str(run), root=str(root), expert=expert, zero=zero, precision=precision
    )
    export_model(tmp_path / "run", tmp_path / "back", shard_bytes=SHARD)
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), hub.tensors(folder))
    # Its config.json says in other words the same: in transformers it computes what the model from the hub computes.
    assert torch.equal(hub.logits(tmp_path / "back", ids(seed)), hub.logits(folder, ids(seed)))


def test_what_a_model_came_with_outlives_training(processes: Processes, tmp_path: Path, seed: int) -> None:
    """hub -> run -> training -> hub: all but the weights is what it was, and the types are the run's."""
    shape = hub.MODELS["qwen3"].config | {"max_position_embeddings": 32768, "eos_token_id": [2, 3], "bos_token_id": 1}
    hub.make(tmp_path / "hub", hub.Hub("Qwen3", shape, torch.bfloat16), seed)
    texts = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"model_max_length": 32768}',
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"do_sample": true, "eos_token_id": [2, 3], "top_p": 0.8}',
        "LICENSE": "free",
    }
    for name, text in texts.items():
        (tmp_path / "hub" / name).write_text(text)
    import_model(tmp_path / "hub", tmp_path / "ours")
    root = tmp_path / "run" / "checkpoints"
    processes(2).run(
        interop.begin_and_save, run=str(tmp_path / "ours"), root=str(root), expert=1, zero=1, precision="float32"
    )
    assert carry_origin(tmp_path / "run", checkpoint_at(tmp_path / "ours"), DataOptions()) is None
    export_model(tmp_path / "run", tmp_path / "back", shard_bytes=SHARD)
    for name, text in texts.items():
        assert (tmp_path / "back" / name).read_text() == text
    want, got = hub.compared_config(tmp_path / "hub"), hub.compared_config(tmp_path / "back")
    assert {key for key in want if want[key] != got.get(key)} <= {"dtype", "_name_or_path"}
    assert {tensor.dtype for tensor in hub.tensors(tmp_path / "back").values()} == {torch.float32}


@pytest.mark.parametrize("expert", [1, 2])
def test_the_layer_of_multi_token_prediction_loads(
    processes: Processes, imported, tmp_path: Path, seed: int, expert: int
) -> None:
    """Its names and shapes are the model's; the logits do not depend on it."""
    folder, _ = imported("deepseek_v3")
    shutil.copytree(folder, tmp_path / "hub")
    content = hub.with_next_token_layer(hub.tensors(folder), seed)
    hub.save(tmp_path / "hub", content)
    import_model(tmp_path / "hub", tmp_path / "ours")
    run = str(tmp_path / "ours")
    for got in processes(expert).run(interop.logits, run=run, ids_BS=ids(seed), expert=expert):
        torch.testing.assert_close(got, hub.logits(folder, ids(seed)), rtol=0, atol=1e-5)
    root = tmp_path / "run" / "checkpoints"
    processes(2).run(interop.begin_and_save, run=run, root=str(root), expert=expert, zero=1, precision="float32")
    export_model(tmp_path / "run", tmp_path / "back", shard_bytes=SHARD)
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), content)
