"""soup and restore-layers on the folders that a run leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_cases import conversations, refusal, result_of, write
from safetensors.torch import load_file, save_file

from fastsft import cli


def shifted(model: Path, target: Path, by: float) -> Path:
    """The same model with noise on its weights."""
    shutil.copytree(model, target)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: t + by * torch.empty(t.shape).normal_(generator=generator)
        for n, t in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_soup(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    far = shifted(model, tmp_path / "far", 5.0)
    result = result_of(capsys, "soup", model, far, "-o", tmp_path / "mean")
    assert result == {"soup": "uniform", "models": [str(model), str(far)], "model_path": str(tmp_path / "mean")}
    cli.main(["generate", str(tmp_path / "mean"), "--prompt", "say", "--max-tokens", "2"])

    data = ["--data", trained / "rows.jsonl"]
    result = result_of(capsys, "soup", far, model, "-o", tmp_path / "greedy", "--greedy", *data)
    assert result["models"] == [str(model)]
    assert [(t["models"], t["kept"]) for t in result["tried"]] == [
        ([str(far)], False), ([str(model)], True), ([str(model), str(far)], False),
    ]  # fmt: skip
    loss = result_of(capsys, "eval", tmp_path / "greedy", *data)["loss"]["loss"]
    assert loss == pytest.approx(result["loss"], rel=1e-6)
    assert loss == pytest.approx(result_of(capsys, "eval", model, *data)["loss"]["loss"], rel=1e-6)
    cli.main([*map(str, ("soup", far, model, "-o", tmp_path / "again", "--greedy", *data))])
    out = capsys.readouterr().out
    assert "held-out loss" in out
    assert f"mean of 1 of 2 models: {tmp_path / 'again'}" in out


def test_soup_refusals(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = trained / "run" / "model", ["-o", tmp_path / "out"]
    assert refusal(capsys, "soup", model, *out) == "soup: models: expected at least two folders, got 1"
    assert "--greedy and --data together" in refusal(capsys, "soup", model, model, *out, "--greedy")
    assert "--greedy and --data together" in refusal(capsys, "soup", model, model, *out, "--data", model)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "the folder of an adapter" in refusal(capsys, "soup", model, tmp_path / "adapter", *out)
    assert "the folder of a run; its model is" in refusal(capsys, "soup", model, trained / "run", *out)
    assert "expected the name of a new folder" in refusal(capsys, "soup", model, model, "-o", model)
    empty = write(tmp_path / "empty.jsonl", [])
    message = refusal(capsys, "soup", model, model, *out, "--greedy", "--data", empty)
    assert message == f"soup: {empty}: no usable row"
    long = write(tmp_path / "long.jsonl", [{"text": "number " * 300}])
    assert "too long" in refusal(capsys, "soup", model, model, *out, "--greedy", "--data", long)


def test_restore_layers(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = trained / "run" / "model"
    tuned = shifted(base, tmp_path / "tuned", 0.1)
    result = result_of(capsys, "restore-layers", tuned, base, "--layers", "0", "-o", tmp_path / "out")
    assert result == {"restored_layers": [0], "model_path": str(tmp_path / "out")}
    ours, old = (load_file(f / "model.safetensors") for f in (tmp_path / "out", base))
    assert torch.equal(ours["model.layers.0.mlp.up_proj.weight"], old["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(ours["model.norm.weight"], old["model.norm.weight"])
    again = ["-o", tmp_path / "again"]
    assert "from 0 to 0, got [1]" in refusal(capsys, "restore-layers", tuned, base, "--layers", "1", *again)
    assert 'such as "0-3,7"' in refusal(capsys, "restore-layers", tuned, base, "--layers", "x", *again)
    write(tmp_path / "rows.jsonl", conversations(2))
    cli.main([*map(str, ("restore-layers", tuned, base, "--layers", "0", *again))])
    assert "layers 0 of" in capsys.readouterr().out
