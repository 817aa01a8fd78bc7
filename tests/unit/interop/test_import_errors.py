"""What is wrong with a model folder is said before anything is written. Pitfall 22: M#5844/PR5845 (tensors left random
without an error). Pitfall 13: FlagScale PR412 (a class without a place for the bias)."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_train.checkpoint.state import state_bytes
from moe_train.cli import main
from moe_train.interop.upcycle import UpcycleOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.convert import export_model, import_model
from moe_train.training.upcycle import upcycle_model
from tests.reference import hub

SEED = secrets.randbits(31)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    print(f"seed {SEED}")
    root = tmp_path_factory.mktemp("hub")

    def get(name: str) -> Path:
        if not (root / name).exists():
            hub.make(root / name, hub.MODELS[name], SEED)
        return root / name

    return get


@pytest.fixture
def folder(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model that a test may spoil."""

    def get(name: str = "qwen3_moe") -> Path:
        shutil.copytree(models(name), tmp_path / "hub")
        return tmp_path / "hub"

    return get


def change(folder: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    content = load_file(path)
    how(content)
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, path, metadata={"format": "pt"})


def error_of(folder: Path, **options: Any) -> str:
    """The message of an import, which leaves nothing behind."""
    out = folder.parent / "ours"
    with pytest.raises(ValueError) as caught:
        import_model(folder, out, **options)
    assert not out.exists() and not list(folder.parent.glob("*partial*")) and not list(folder.parent.glob(".*"))
    return str(caught.value)


def test_tensors_that_are_missing_or_unexpected_are_named(folder: Callable[..., Path]) -> None:
    path = folder()
    gone = "model.layers.1.mlp.experts.5.up_proj.weight"

    def spoil(content: dict[str, Tensor]) -> None:
        del content[gone]
        content["model.layers.0.mlp.shared_expert.gate_proj.weight"] = torch.ones(2, 2)
        content["model.norm.weight"] = torch.ones(7)

    change(path, spoil)
    message = error_of(path)
    assert f"missing: {gone}" in message and "unexpected: model.layers.0.mlp.shared_expert.gate_proj.weight" in message
    assert "model.norm.weight has shape [7], expected [48]" in message


def test_at_most_ten_problems_are_shown(folder: Callable[..., Path]) -> None:
    path = folder()

    def fuse(content: dict[str, Tensor]) -> None:
        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts"
            for name in [name for name in content if name.startswith(prefix)]:
                del content[name]
            content[f"{prefix}.gate_up_proj"] = torch.zeros(8, 48, 48)

    change(path, fuse)
    message = error_of(path)
    assert "… and 65 more" in message and message.count("\n") == 11


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.qkv_proj.weight"]
)
def test_another_layout_is_explained(folder: Callable[..., Path], name: str) -> None:
    path = folder()
    change(path, lambda content: content.update({name: torch.zeros(2, 2)}))
    message = error_of(path)
    assert f"unexpected: {name} (" in message and "in one tensor" in message and "save_pretrained" in message


def test_parts_of_one_tensor_have_one_type(folder: Callable[..., Path]) -> None:
    path = folder()
    name = "model.layers.0.self_attn.k_proj.weight"
    change(path, lambda content: content.update({name: content[name].bfloat16()}))
    assert f"{name} is torch.bfloat16, model.layers.0.self_attn.q_proj.weight torch.float32" in error_of(path)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen3_moe", "model_type", "qwen2_moe"),
        ("qwen3_moe", "hidden_act", "gelu"),
        ("qwen3_moe", "attention_bias", True),
        ("qwen3_moe", "new_key_that_nobody_knows", 3),
        ("qwen3_moe", "num_experts", 4),
        ("qwen3_moe", "mlp_only_layers", [7]),
        ("qwen3_moe", "vocab_size", "many"),
        ("qwen3_moe", "partial_rotary_factor", 0.5),
        ("qwen3_moe", "auto_map", {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}),
        ("qwen3_moe", "quantization_config", {"quant_method": "gptq"}),
        ("mixtral", "sliding_window", 16),
        ("llama3", "mlp_bias", True),
        ("llama3", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama3", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "qk_head_dim", 99),
        ("deepseek_v3", "num_nextn_predict_layers", 2),
    ],
)
def test_what_our_models_cannot_do_is_named(folder: Callable[..., Path], name: str, key: str, value: Any) -> None:
    path = folder(name)
    hub.edit_config(path, **{key: value})
    message = error_of(path)
    assert message.startswith(str(path)) and "config.json" in message and key in message


def test_the_older_form_of_rope_says_the_same(folder: Callable[..., Path]) -> None:
    from moe_train.interop.config_import import from_hub

    path = folder("llama3")
    new = json.loads((path / "config.json").read_text())
    rope = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": rope.pop("rope_theta")}
    assert from_hub(old | {"rope_scaling": rope}) == from_hub(new)
    assert from_hub(old | {"rope_scaling": {**rope, "type": rope.pop("rope_type")}}) == from_hub(new)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "damaged"),
        (lambda p: (p / "model.safetensors").unlink(), "no weights"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickles only (pytorch_model.bin)"),
        (lambda p: os.truncate(p / "model.safetensors", 70_000), "ends before the values"),
        (lambda p: (p / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"), "git-lfs"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 100), "no safetensors file"),
        (lambda p: shutil.rmtree(p), "there is no folder"),
    ],
)
def test_what_is_no_model_folder_is_refused(folder: Callable[..., Path], spoil: Any, message: str) -> None:
    path = folder()
    spoil(path)
    assert message in error_of(path)


def test_a_shard_that_is_missing_is_named(folder: Callable[..., Path]) -> None:
    path = folder("mixtral_heads_linear_shards")
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"lacks {gone.name}" in error_of(path)


def test_an_existing_folder_is_replaced_by_force_and_only_if_it_is_ours(folder: Callable[..., Path]) -> None:
    path = folder()
    out = path.parent / "ours"
    import_model(path, out)
    with pytest.raises(ValueError, match="exists already"):
        import_model(path, out)
    import_model(path, out, force=True)
    (out / "metrics.jsonl").write_text("")  # a run has trained in it
    with pytest.raises(ValueError, match="not an imported model"):
        import_model(path, out, force=True)
    with pytest.raises(ValueError, match="not an exported model"):
        export_model(out, path.parent / "ours", shard_bytes=10**9, force=True)


def test_force_knows_an_export_from_what_was_downloaded(folder: Callable[..., Path]) -> None:
    path = folder()
    ours, exported = path.parent / "ours", path.parent / "exported"
    import_model(path, ours)
    with pytest.raises(ValueError, match="not an exported model"):
        export_model(ours, path, shard_bytes=10**9, force=True)
    export_model(ours, exported, shard_bytes=10**9)
    export_model(ours, exported, shard_bytes=10**9, force=True)
    (exported / ".git").mkdir()
    with pytest.raises(ValueError, match="has a folder .git"):
        export_model(ours, exported, shard_bytes=10**9, force=True)
    (ours / "evaluation").mkdir()
    with pytest.raises(ValueError, match="has a folder evaluation"):
        import_model(path, ours, force=True)


def test_an_imported_model_and_an_upcycled_one_do_not_replace_each_other(folder: Callable[..., Path]) -> None:
    path = folder("qwen3")
    ours, upcycled = path.parent / "ours", path.parent / "upcycled"
    import_model(path, ours)
    router, options = RouterOptions("softmax_topk", {"top_k": 2}), UpcycleOptions(4)
    upcycle_model(ours, upcycled, router, options)
    with pytest.raises(ValueError, match="not an imported model"):
        import_model(path, upcycled, force=True)
    with pytest.raises(ValueError, match="not an upcycled model"):
        upcycle_model(upcycled, ours, router, options, force=True)
    upcycle_model(ours, upcycled, router, options, force=True)
    (upcycled / "metrics.jsonl").touch()  # a run has trained in it
    with pytest.raises(ValueError, match="not an upcycled model"):
        upcycle_model(ours, upcycled, router, options, force=True)


def test_a_full_disk_leaves_nothing_and_is_said(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder()
    out = path.parent / "ours"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moe_train.checkpoint.writing._Stream.write", full)
    assert main(["convert", "import", str(path), str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in path.parent.iterdir()) == ["hub"]


def test_ctrl_c_leaves_nothing(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder()

    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_train.interop.safetensors_file.StoredTensor.rows", stop)
    assert main(["convert", "import", str(path), str(path.parent / "ours")]) == 130
    assert "is as it was" in capsys.readouterr().err
    assert sorted(p.name for p in path.parent.iterdir()) == ["hub"]


@pytest.mark.parametrize(
    "content",
    [b"[]", state_bytes({"step": 0}, b""), state_bytes({"config": {"model": 5}, "step": 0}, b"")],
    ids=range(3),
)
def test_a_state_that_is_damaged(folder: Callable[..., Path], content: bytes) -> None:
    path = folder("qwen3")
    ours = path.parent / "ours"
    import_model(path, ours)
    (ours / "checkpoints" / "step_00000000" / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match="step_00000000"):
        export_model(ours, path.parent / "out", shard_bytes=10**9)
    with pytest.raises(ValueError, match="step_00000000"):
        upcycle_model(ours, path.parent / "out", RouterOptions("softmax_topk", {"top_k": 2}), UpcycleOptions(4))
    assert not (path.parent / "out").exists()
