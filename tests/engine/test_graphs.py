"""Steps in padded buffers and their replays, with a capture on the CPU that runs again what it was given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import SHAPE, as_prompts, assert_nothing_held, engine, prompts_of, tokenizer, write_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastsft.engine import device_runner, place
from fastsft.engine.device_runner import DeviceRunner
from fastsft.engine.graphs import CudaCapture, DecodeSteps, Graph, bucket_of
from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams
from fastsft.engine.runner import Inputs
from fastsft.models.adapter import save_adapter
from fastsft.models.device import place_decoder
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.models.weights import init_model, load_model

BLOCK, BLOCKS = 16, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


class NoWaiting(TorchDispatchMode):
    """As on a device while a graph is captured: nothing may be read back."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*args, **(kwargs or {}))


class Recorder:
    """Keeps what a capture was given; a replay runs it again."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, run: Callable[[], None]) -> Graph:
        self.captured += 1

        class Recorded:
            def replay(self) -> None:
                with NoWaiting():
                    run()

        return Recorded()


def graphed(model: Any, recorder: Recorder | None, **options: Any) -> LLM:
    """As on a GPU, with ``recorder`` for its graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "PACKED", ())
        patch.setattr(place, "DeviceRunner", lambda *a, **k: DeviceRunner(*a, **k | {"capture": recorder}))
        return engine(model, **options) if isinstance(model, Path) else LLM(model, tokenizer(), num_blocks=64)


def texts(llm: LLM, prompts: list[list[int]], **params: Any) -> list[list[tuple[int, ...]]]:
    outputs = llm.generate(as_prompts(prompts), SamplingParams(**{"max_tokens": 24, "ignore_eos": True} | params))
    assert_nothing_held(llm)
    return [[o.token_ids for o in r.outputs] for r in outputs]


def random_step(generator: torch.Generator, count: int) -> Inputs:
    """Sequences of one more token, of any lengths, in blocks of their own."""
    blocks = torch.randperm(BLOCKS, generator=generator)[:count, None].int()
    return Inputs(
        torch.randint(SHAPE["vocab_size"], (count,), generator=generator),  # type: ignore[call-overload]
        torch.arange(count + 1, dtype=torch.int32),
        torch.randint(1, BLOCK + 1, (count,), generator=generator, dtype=torch.int32),
        blocks,
    )


def prompt_step(count: int) -> Inputs:
    """The first tokens of one sequence."""
    return Inputs(
        torch.arange(count) + 8,
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        torch.tensor([[7, 3]], dtype=torch.int32),
    )


def test_the_next_power_of_two() -> None:
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 64, 65)] == [1, 2, 4, 4, 8, 8, 16, 64, 128]


def test_a_replay_has_the_bits_of_the_step_and_writes_what_it_writes() -> None:
    """Steps of all sizes in turn, so that each replay finds other rows in its buffers than the time before."""
    model = place_decoder(init_model(SHAPE | {"model_type": "qwen2"}, seed=5), "bfloat16", device="cpu")
    first = model.new_cache(BLOCKS + 1, BLOCK).normal_(generator=torch.Generator().manual_seed(1))
    caches = [first, first.clone()]
    recorder, generator, told = Recorder(), torch.Generator().manual_seed(2), list[tuple[int, int]]()
    steps = [
        DecodeSteps(model, cache, block_size=BLOCK, max_rows=6, capture=capture)
        for cache, capture in zip(caches, (recorder, None), strict=True)
    ]
    addresses = set()
    with torch.inference_mode():
        for each in steps:
            each.capture_all(lambda done, total: told.append((done, total)))
        assert told == [(done, 4) for done in range(5)]
        for turn in range(4):
            for count in (1, 3, 8, 2, 5):
                before, inputs = caches[0].clone(), random_step(generator, count)
                (hidden, logits), (same_hidden, same_logits) = (step(inputs) for step in steps)
                addresses.add((hidden.data_ptr(), logits.data_ptr()))
                assert hidden.shape[0] == logits.shape[0] == count
                assert torch.equal(hidden, same_hidden), turn
                assert torch.equal(logits, same_logits), turn
                changed = (caches[0] != before).flatten(4).any(-1).any(0).any(0)[:BLOCKS].nonzero().tolist()
                places = zip(inputs.block_table[:, 0].tolist(), (inputs.context_lens_B - 1).tolist(), strict=True)
                assert sorted(map(tuple, changed)) == sorted(places)
                assert torch.equal(caches[0][:, :, :BLOCKS], caches[1][:, :, :BLOCKS])
    assert len(addresses) == 1, "a replay writes where the capture wrote"
    assert recorder.captured == 4  # 1, 2, 4 and 8 rows
    assert steps[0].replayed == 20
    assert steps[1].replayed == 0


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 3, "n": 3}], ids=["greedy", "sampled"])
def test_texts_are_those_without_graphs(params: dict[str, Any], folder: Path) -> None:
    """Sequences join, end and are preempted between replays; contexts outgrow the width of a block table."""
    prompts = prompts_of([5, 40, 70, 16, 33])
    llm = graphed(folder, Recorder(), max_num_seqs=6, num_blocks=20, max_batched_tokens=50)
    expected = texts(engine(folder), prompts, **params)
    assert texts(llm, prompts, **params) == expected
    assert llm.core.stats().graph_steps > 10
    plain = graphed(folder, None, max_num_seqs=6)
    assert texts(plain, prompts, **params) == expected
    assert plain.core.stats().graph_steps == plain.core.stats().warm_up_seconds == 0


def test_everything_is_captured_before_the_first_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For blocks of 16 tokens tables of up to 16 columns are one size; the model's 256 tokens take 16, of 512 two."""
    shapes, run = list[tuple[int, int]](), DecodeSteps._run

    def noting(self: DecodeSteps, rows: Any, size: int) -> None:
        shapes.append((size, rows.block_table.shape[1]))
        run(self, rows, size)

    monkeypatch.setattr(DecodeSteps, "_run", noting)
    prompts, folder = prompts_of([5, 40, 33]), write_model(tmp_path / "model", "qwen3")
    for limit, widths in ((256, [16]), (512, [32, 16])):
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": limit}
        (folder / "config.json").write_text(json.dumps(config))
        recorder = Recorder()
        shapes.clear()
        llm = graphed(folder, recorder, max_num_seqs=6)
        assert shapes == [(size, width) for size in (8, 4, 2, 1) for width in widths], "the largest first"
        assert recorder.captured == len(shapes)
        assert llm.core.stats().warm_up_seconds > 0
        assert not llm.core._runner._cache.any()  # type: ignore[attr-defined]
        assert texts(llm, prompts) == texts(engine(folder), prompts)
        assert recorder.captured == 4 * len(widths)
        stats = llm.core.stats()
        assert stats.graph_steps >= stats.steps - 2, "all but those with prompts"


@pytest.mark.parametrize("tokens", [1, 15, 100, 256, 257, 700])
def test_the_largest_step_with_prompts_runs_at_load(tokens: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[Inputs]()
    forward = DeviceRunner.forward

    def noting(self: DeviceRunner, inputs: Inputs, *others: Any) -> torch.Tensor:
        steps.append(inputs)
        return forward(self, inputs, *others)

    monkeypatch.setattr(DeviceRunner, "forward", noting)
    graphed(folder, Recorder(), max_batched_tokens=tokens, num_blocks=9)
    *_, step = steps
    assert len(steps) == sum(n < tokens for n in (17, 33)) + 1
    assert len(step.ids_T) == step.cu_seqlens[-1] == tokens
    assert step.context_lens_B.max() == min(tokens, 9 * BLOCK)


def test_the_kernels_that_prompts_run_at_load_are_all_there_are() -> None:
    pytest.importorskip("triton")
    from fastsft.ops._triton.device_linear import tile_of

    assert tuple(n for n in range(2, 65) if tile_of(n) != tile_of(n - 1)) == device_runner._KERNELS


class FakeGraph:
    """What torch does with a capture, without a GPU."""

    def pool(self) -> str:
        return "pool"


def test_captures_are_on_a_stream_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own is on the device that captured first; captures share one pool, and other threads do not end them."""
    captures = list[dict[str, Any]]()

    @contextmanager
    def graph(graph: Any, **options: Any) -> Iterator[None]:
        captures.append(options)
        yield

    for name, stand_in in (
        ("CUDAGraph", FakeGraph),
        ("Stream", lambda device: f"stream of {device}"),
        ("device", lambda device: nullcontext()),
        ("graph", graph),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for device in ("cuda:0", "cuda:1"):
        capture = CudaCapture(torch.device(device))
        for _ in range(2):
            capture(lambda: None)
    same = {"capture_error_mode": "thread_local"}
    assert captures == [
        {"pool": pool, "stream": f"stream of {device}"} | same
        for device in ("cuda:0", "cuda:1")
        for pool in (None, "pool")
    ]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_drafts_are_rows_of_a_replay(params: dict[str, Any], folder: Path) -> None:
    prompts = [p * 3 for p in prompts_of([8, 12, 9])]
    config = {"method": "ngram", "adaptive": False, "num_speculative_tokens": 5, "prompt_lookup_min": 1}
    llm = graphed(folder, Recorder(), speculative_config=config)
    expected = texts(engine(folder), prompts, **params)
    for _ in range(2):
        assert texts(llm, prompts, **params) == expected
    stats = llm.core.stats()
    assert stats.drafted_tokens
    assert stats.graph_steps > stats.steps // 3


def test_tokens_of_one_sequence_are_those_of_a_step_of_its_own() -> None:
    """Logits and what is left in the cache, in float32 to rounding, beside one step with a sequence of several rows."""
    model = place_decoder(init_model(SHAPE | {"model_type": "qwen2"}, seed=5), "float32", device="cpu")
    found = []
    for max_rows in (16, 1):  # the second is too small for the step
        runner = DeviceRunner(model, block_size=BLOCK, num_blocks=BLOCKS, max_rows=max_rows, capture=None)
        found.append((runner.forward(prompt_step(13), torch.arange(13)).clone(), runner._cache[:, :, :BLOCKS].clone()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_new_weights_under_a_captured_step(folder: Path) -> None:
    old, prompts = load_model(folder), prompts_of([9, 20])
    new = init_model(old.config, seed=8)
    llm = graphed(old, Recorder())
    assert texts(llm, prompts) == texts(LLM(old, tokenizer(), num_blocks=64), prompts)
    replayed = llm.core.stats().graph_steps
    llm.update_weights(new)
    assert texts(llm, prompts) == texts(LLM(new, tokenizer(), num_blocks=64), prompts)
    assert llm.core.stats().graph_steps > replayed


def test_what_runs_kernel_by_kernel(folder: Path, tmp_path: Path) -> None:
    """Adapters, more tokens than the largest graph has rows, and prompts."""
    model = load_model(folder)
    add_lora(model, LoraConfig(rank=2), seed=1)
    save_adapter(model, tmp_path)
    llm = graphed(folder, Recorder(), adapters={"red": tmp_path})
    llm.generate(as_prompts(prompts_of([5, 9])), SamplingParams(max_tokens=6), adapter="red")
    assert llm.core.stats().graph_steps == 0
    runner = llm.core._runner
    assert isinstance(runner, DeviceRunner)
    with torch.inference_mode():
        for _ in range(3):
            inputs = random_step(torch.Generator().manual_seed(1), 4)
            runner.decode.max_rows = 2
            runner.forward(inputs, torch.arange(4))
            runner.forward(prompt_step(17), torch.tensor([16]))
        assert runner.graph_steps == 0
        runner.decode.max_rows = 4
        for _ in range(3):
            assert runner.forward(inputs, torch.tensor([3, 1])).shape == (2, SHAPE["vocab_size"])
    assert runner.graph_steps == 3
