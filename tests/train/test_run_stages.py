"""Runs of several stages: mixtures and rates of their own, easy samples left out, resumed to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_resume import run_config, weights, write_texts
from resume_cases import train
from train_cases import model_of, random_samples

from fastsft.config import ConfigError, load_config
from fastsft.data.batch import VarlenBatch
from fastsft.data.store import SampleStore
from fastsft.models.decoder import Decoder
from fastsft.train import light
from fastsft.train.evaluate import evaluate_loss
from fastsft.train.light import choose
from fastsft.train.metrics import read_metrics
from fastsft.train.parallel import Copies
from fastsft.train.trainer import Trainer
from fastsft.train.update import NonFiniteError, Update

STAGES = [
    {"name": "coarse", "weights": {"web": 1.0, "books": 1.0}, "max_steps": 3},
    {"name": "light", "weights": {"books": 1.0}, "drop_easy": 0.5, "lr": 1e-3},
    {"name": "where it learns", "curriculum": "ucb", "curriculum_steps": 2, "max_steps": 7},
    {"name": "last", "ratios": {"a": 1, "b": 2}, "epochs": 2, "max_steps": 4},
]


def staged(tmp_path: Path, output: str, **train: Any) -> dict[str, Any]:
    config = run_config(tmp_path / "unused", tmp_path / output, **train)
    sources = []
    for seed, (name, tag) in enumerate((("web", "a"), ("books", "b"))):
        path = tmp_path / f"{name}.jsonl"
        if not path.exists():
            write_texts(path, 30, seed)
        sources.append({"name": name, "files": [str(path)], "tag": tag})
    config["data"] |= {"train": [], "sources": sources}
    for key in ("epochs", "max_steps"):
        del config["train"][key]
    return {**config, "stages": STAGES}


def test_each_stage_has_its_own_mixture_rate_and_schedule(tmp_path: Path) -> None:
    trainer, result = train(staged(tmp_path, "run"))
    lines = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "step"]
    assert [m["step"] for m in lines] == list(range(1, result.steps + 1))
    by_stage = {s["name"]: [m for m in lines if m["stage"] == s["name"]] for s in STAGES}
    assert [len(by_stage[n]) for n in ("coarse", "last")] == [3, 4]
    assert all(m["sources"].keys() == {"books"} for m in by_stage["light"])
    assert any(m["sources"].keys() == {"web", "books"} for m in by_stage["coarse"])
    assert max(m["lr"] for m in by_stage["light"]) == pytest.approx(1e-3, rel=0.2)
    for stage in by_stage.values():
        assert stage[-1]["lr"] == pytest.approx(0, abs=1e-9), "every stage decays to the end"
    epochs = [[m["epoch"] for m in stage] for stage in by_stage.values()]
    assert epochs[0][0] == 0 < epochs[1][0] == 1 < epochs[3][0] == 3, "no stage repeats another's order"
    assert epochs[2] == sorted(epochs[2])
    assert epochs[2][-1] >= 2, "the shares are chosen anew"
    # Half of the second source's samples, and none of the first's.
    store = trainer.prepared.train
    kept = light.unpacked(trainer.stages[1].state()["kept"], len(store))
    seen = [s for step in range(trainer.stages[1].steps) for b in trainer.stages[1].batches(step) for s in b.sources]
    expected = [store[i].source for i in np.flatnonzero(kept & (store.origins == 1))]
    assert sorted(seen) == sorted(expected)


def test_a_run_of_stages_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after each of its steps, those at the edges of stages included."""
    whole, result = train(staged(tmp_path, "whole"))
    update = Update.__call__
    expected = weights(result.model_path)
    config = staged(tmp_path, "run", save_every=2)
    for stop in range(1, result.steps + 1):
        with monkeypatch.context() as patch:

            def lost(self: Update, number: int, *args: Any, at: int = stop) -> Any:
                if number == at:
                    raise NonFiniteError("lost here")
                return update(self, number, *args)

            patch.setattr(Update, "__call__", lost)
            if stop < result.steps:
                with pytest.raises(NonFiniteError, match="lost here"):
                    train(config)
    _, again = train(config)
    assert weights(again.model_path) == expected
    logs = [
        [{k: m[k] for k in ("step", "stage", "loss", "lr")} for m in read_metrics(tmp_path / o / "metrics.jsonl")
         if m["kind"] == "step"] for o in ("whole", "run")
    ]  # fmt: skip
    assert logs[0] == logs[1]
    assert whole.total_steps == result.steps


def test_a_stage_without_a_tag_of_the_ratios(tmp_path: Path) -> None:
    """Whose table is at fault is told, and a stage can do without ratios."""
    config = staged(tmp_path, "run")
    config["data"]["ratios"] = {"a": 1, "b": 1}
    stage = {"name": "books alone", "weights": {"books": 1.0}, "max_steps": 2}
    with pytest.raises(ConfigError, match=r"^data\.ratios in the stage 'books alone': no sample has the tag 'a'"):
        Trainer(load_config({**config, "stages": [stage]}), progress=False)
    with pytest.raises(ConfigError, match=r"^ratios of the stage 'books alone': no sample has the tag 'a'"):
        Trainer(load_config({**config, "stages": [{**stage, "ratios": {"a": 2, "b": 1}}]}), progress=False)
    assert train({**config, "stages": [{**stage, "ratios": {}}]})[1].steps == 2


def test_the_easy_ones_are_left_out() -> None:
    store = SampleStore.from_samples(random_samples(20, 9))
    model = model_of()
    kept = choose(Copies(model), store, share=0.3, capacity=60)
    assert (light.unpacked(light.packed(kept), 20) == kept).all()
    losses = []
    for i in range(20):
        found = evaluate_loss(model, SampleStore.from_samples([store[i]]), capacity=60)
        assert found is not None
        losses.append(found.loss)
    assert set(np.flatnonzero(~kept)) == set(np.argsort(losses)[:6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages: expected different names"),
        ({"stages": [{"name": "a", "weights": {"wbe": 1}}]}, r"stages\.0\.weights: expected names of .*web, books"),
        ({"stages": [{"name": "a", "drop_easy": 1.0}]}, r"stages\.0\.drop_easy: expected a share in \[0, 1\)"),
        ({"stages": [{"name": "a", "wieghts": {}}]}, "unknown key 'stages.0.wieghts'; did you mean 'weights'"),
        ({"train": {"max_steps": 3}}, r"stages: expected train\.epochs and train\.max_steps unset"),
        ({"objective": {"reduction": "constant"}}, r"objective\.constant: expected a number if, and only if"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = json.loads(json.dumps(staged(tmp_path, "run")))
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    with pytest.raises(ConfigError, match=message):
        load_config(config)


def test_a_stage_without_samples(tmp_path: Path) -> None:
    config = staged(tmp_path, "run")
    config["stages"] = [{"name": "none", "weights": {"web": 0.0}}]
    with pytest.raises(ConfigError, match="leave no sample for the stage 'none'"):
        Trainer(load_config(config), progress=False)
    config["stages"] = [{"name": "some"}, {"name": "none", "weights": {"web": 0.0}}]
    with pytest.raises(ConfigError, match="leave no sample for the stage 'none'"):
        Trainer(load_config(config), progress=False)


def test_the_share_is_that_of_the_stages_samples(tmp_path: Path) -> None:
    """Also where those of other sources are easier, or harder, than all of them."""
    config = staged(tmp_path, "run")
    config["stages"] = [{"name": "light", "weights": {"books": 1.0}, "drop_easy": 0.5}]
    trainer = Trainer(load_config(config), progress=False)
    store = trainer.prepared.train
    judged: list[int] = []
    losses = light._mean_losses

    def loss_by_source(model: Decoder, batch: VarlenBatch) -> Any:
        judged.extend(batch.origins)
        return losses(model, batch) + 100 * torch.tensor(batch.origins)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(light, "_mean_losses", loss_by_source)
        trainer.run()
    kept = light.unpacked(trainer.stages[0].state()["kept"], len(trainer.prepared.train))
    books = int((store.origins == 1).sum())
    assert kept.sum() == books - books // 2
    assert not kept[store.origins == 0].any()
    assert judged == [1] * books, "no time is spent on samples that the stage does not have"


def test_the_choice_of_a_light_stage_is_under_the_checksum(tmp_path: Path) -> None:
    config = staged(tmp_path, "run")
    config["stages"] = [{"name": "light", "drop_easy": 0.6}]
    trainer, first = train(config)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    kept = trainer.stages[0].state()["kept"]
    other = light.packed(~light.unpacked(kept, len(trainer.prepared.train)))
    text = (newest / "trainer.json").read_text()
    assert kept in text
    (newest / "trainer.json").write_text(text.replace(kept, other))
    _, again = train(config)
    assert again.resumed_from == first.steps - 1, "the newest is not taken"
    assert weights(again.model_path) == weights(first.model_path)


def test_resumed_after_the_last_step_of_a_light_stage(tmp_path: Path) -> None:
    """The stage has fewer steps than was known before it began, and all of them are done."""
    config = staged(tmp_path, "run")
    config["stages"] = [{"name": "light", "drop_easy": 0.6}]
    _, first = train(config)
    _, again = train(config)
    assert again.resumed_from == again.steps == first.steps
    assert again.eval_after == first.eval_after != first.eval_before
