"""Scripts that set torch's default type or device, as many for large models do: an engine's texts do not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import SHAPE, as_prompts, engine, prompts_of, write_adapters, write_model
from test_device_engine import device_engine

from fastsft.data.batch import Sample, collate
from fastsft.engine.request import SamplingParams
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.models.weights import init_model, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture
def default() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("make", [engine, device_engine], ids=["packed", "device"])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"quantization": "int8"}, {"quantization": "int4"}, {"draft": True}],
    ids=["float32", "bfloat16", "int8", "int4", "draft model"],
)  # fmt: skip
def test_the_default_type_changes_nothing(
    options: dict[str, Any], make: Any, folder: Path, tmp_path: Path, default: None
) -> None:
    adapters, found = write_adapters(folder, tmp_path, "a"), []
    if "draft" in options:
        config = {"method": "draft_model", "model": folder, "acceptance": "rejection", "adaptive": False}
        options = {"speculative_config": config}
    params = SamplingParams(
        temperature=0.8, top_p=0.9, seed=1, logprobs=1, prompt_logprobs=0, logit_bias={40: 1.0}, max_tokens=12
    )
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        llm = make(folder, adapters=adapters, **options)
        outputs = llm.generate(as_prompts(prompts_of([20, 33])), params, adapter=["a", None])
        found.append([(o.outputs, o.prompt_logprobs) for o in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("make", [engine, device_engine], ids=["packed", "device"])
def test_the_default_device_changes_nothing(make: Any, folder: Path, tmp_path: Path, default: None) -> None:
    """A script's "cuda"; here a device on which nothing can be computed."""
    adapters, found = write_adapters(folder, tmp_path, "a"), []
    new, prompts = load_model(folder), as_prompts(prompts_of([20, 33]))
    params = SamplingParams(temperature=0.8, seed=1, prompt_logprobs=0, logit_bias={40: 1.0}, max_tokens=12)
    for device in (None, "meta"):
        torch.set_default_device(device)
        llm = make(folder, adapters=adapters, speculative_config={"method": "draft_model", "model": folder})
        for _ in range(2):
            outputs = llm.generate(prompts, params, adapter=["a", None])
            found.append([([c.token_ids for c in o.outputs], o.prompt_logprobs) for o in outputs])
            llm.core.add_adapter("b", adapters["a"])
            llm.update_weights(new)
    assert found[:2] == found[2:]


@pytest.mark.parametrize("make", [engine, device_engine], ids=["packed", "device"])
def test_log_probs_are_the_same(make: Any, folder: Path, default: None) -> None:
    model, found = load_model(folder), []
    llm = make(folder)
    batch = collate([Sample(np.array(ids, np.int32), np.ones(len(ids), np.float32)) for ids in prompts_of([20, 33])])
    for dtype, device in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "meta")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        with torch.no_grad():
            found.append(llm.log_probs(model, batch))
    assert found[0].any()
    for values in found[1:]:
        assert torch.equal(values, found[0])


def test_fresh_weights_are_the_same(default: None) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        model = init_model(SHAPE | {"model_type": "qwen2"}, seed=3, dtype=torch.float32)
        add_lora(model, LoraConfig(rank=4), seed=4)
        found.append(dict(model.named_parameters()))
    for name, parameter in found[0].items():
        assert torch.equal(parameter, found[1][name]), name
