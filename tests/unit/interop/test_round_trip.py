"""What is special in a round trip: multi-token prediction, repeated tensors, 8-bit blocks, types, other files."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_train.cli import main
from moe_train.training.convert import export_model, import_model
from tests.reference import hub

SEED = secrets.randbits(31)
SHARD = 10**9


def make(folder: Path, name: str) -> dict[str, Tensor]:
    print(f"seed {SEED}")
    hub.make(folder, hub.MODELS[name], SEED)
    return load_file(folder / "model.safetensors")


def test_the_layer_of_multi_token_prediction_is_kept_or_dropped_as_asked(tmp_path: Path) -> None:
    content = make(tmp_path / "hub", "deepseek_v3")
    plain = import_model(tmp_path / "hub", tmp_path / "without")
    assert any("no file holds it" in note for note in plain.notes)
    whole = hub.with_next_token_layer(content, SEED)
    hub.save(tmp_path / "hub", whole)
    assert any("is kept" in note for note in import_model(tmp_path / "hub", tmp_path / "kept").notes)
    export_model(tmp_path / "kept", tmp_path / "back", shard_bytes=SHARD)
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), whole)
    dropped = import_model(tmp_path / "hub", tmp_path / "dropped", drop_multi_token=True)
    assert any("left out as asked" in note for note in dropped.notes)
    export_model(tmp_path / "dropped", tmp_path / "back2", shard_bytes=SHARD)
    assert hub.same_bytes(hub.tensors(tmp_path / "back2"), content)
    whole["model.layers.3.embed_tokens.weight"][3, 4] += 1
    hub.save(tmp_path / "hub", whole)
    with pytest.raises(ValueError, match="embed_tokens.weight should repeat model.embed_tokens.weight, but differs"):
        import_model(tmp_path / "hub", tmp_path / "ours")


def test_a_head_beside_a_tied_embedding_is_compared_and_written_again(tmp_path: Path) -> None:
    content = make(tmp_path / "hub", "qwen3_moe_tied_mixed_yarn")
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    hub.save(tmp_path / "hub", content)
    report = import_model(tmp_path / "hub", tmp_path / "ours")
    assert any("inv_freq" in note for note in report.notes)
    export_model(tmp_path / "ours", tmp_path / "back", shard_bytes=SHARD)
    del content["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), content)


def test_8_bit_blocks_become_bfloat16(tmp_path: Path) -> None:
    """Rows of the fused parameters lie in other blocks than rows of the files: 130 rows, blocks of 128."""
    config = {**hub.MODELS["qwen3"].config, "hidden_size": 144, "intermediate_size": 130, "num_hidden_layers": 1}
    hub.make(tmp_path / "hub", hub.Hub("Qwen3", config, torch.bfloat16), SEED)
    content = load_file(tmp_path / "hub" / "model.safetensors")
    want = dict(content)
    for name in [n for n in content if "_proj" in n]:
        whole = content[name].float()
        rows, columns = (-(-size // 128) for size in whole.shape)
        scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(SEED)) + 0.01
        spread = scale.repeat_interleave(128, 0)[: whole.shape[0]].repeat_interleave(128, 1)[:, : whole.shape[1]]
        content[name] = (whole / spread).clamp(-400, 400).to(torch.float8_e4m3fn)
        content[f"{name}_scale_inv"] = scale
        want[name] = (content[name].float() * spread).bfloat16()
    hub.save(tmp_path / "hub", content)
    with pytest.raises(ValueError, match="float8"):
        import_model(tmp_path / "hub", tmp_path / "ours")
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    hub.edit_config(tmp_path / "hub", quantization_config=quantization)
    assert any("dequantised" in note for note in import_model(tmp_path / "hub", tmp_path / "ours").notes)
    export_model(tmp_path / "ours", tmp_path / "back", shard_bytes=SHARD)
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), want)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_other_files_travel(tmp_path: Path) -> None:
    make(tmp_path / "hub", "llama3")
    (tmp_path / "hub" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "hub" / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "hub" / "README.md").write_text("card")
    import_model(tmp_path / "hub", tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    export_model(tmp_path / "ours", tmp_path / "back", shard_bytes=SHARD)
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names | {".moe_train_export"}
    for name in names - {"model.safetensors", "config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()


def test_another_type_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = make(tmp_path / "hub", "deepseek_v3")
    assert main(["convert", "import", str(tmp_path / "hub"), str(tmp_path / "ours")]) == 0
    arguments = ["convert", "export", str(tmp_path / "ours"), str(tmp_path / "back"), "--dtype", "bfloat16"]
    assert main([*arguments, "--max-shard-size", "50KB", "--step", "0"]) == 0
    assert "DeepseekV3ForCausalLM" in capsys.readouterr().out
    want = {n: t if n.endswith("e_score_correction_bias") else t.bfloat16() for n, t in content.items()}
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), want)
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 4 and all(path.stat().st_size < 60_000 for path in files)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert main([*arguments[:3], str(tmp_path / "other"), "--step", "5"]) == 2


def test_a_config_without_the_name_of_a_class(tmp_path: Path) -> None:
    content = make(tmp_path / "hub", "llama3")
    hub.edit_config(tmp_path / "hub", architectures=...)
    import_model(tmp_path / "hub", tmp_path / "ours")
    assert "LlamaForCausalLM" in export_model(tmp_path / "ours", tmp_path / "back", shard_bytes=SHARD).summary
    assert hub.same_bytes(hub.tensors(tmp_path / "back"), content)
    assert "`LlamaForCausalLM`, which transformers ships" in (tmp_path / "back" / "README.md").read_text()
