"""README and docs tell the truth: links resolve, code runs, samples come out so, keys and reasons are all there."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsft import cli
from fastsft.config import Config, load_config
from fastsft.data.prepare import prepare
from fastsft.engine.request import SamplingParams
from fastsft.verify.sandbox import Limits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def _blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, rest of the info string, content) of each fenced block."""
    found = re.findall(r"^```(\w*)[ ]*(.*?)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [(language, options, content) for language, options, content in found]


@PAGE
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in slugs, f"{page.name}: {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme, page.name


def test_files_the_readme_names_exist() -> None:
    for name in re.findall(r"\bexamples/[\w.]+", "".join(p.read_text(encoding="utf-8") for p in PAGES)):
        assert (ROOT / name).is_file(), name


@PAGE
def test_python_blocks_compile_and_name_what_exists(page: Path) -> None:
    for language, _, content in _blocks(page):
        if language == "python":
            tree = ast.parse(content, page.name)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom | ast.Import):
                    exec(compile(ast.Module([node], []), page.name, "exec"), {})


@PAGE
def test_toml_blocks_load(page: Path) -> None:
    for language, options, content in _blocks(page):
        if language == "toml" and options != "part":
            load_config(tomllib.loads(content))


def _commands(page: Path) -> list[str]:
    """Every ``fastsft ...`` of a page, in a block or within a line. With [ ], < > or capitals it is a pattern."""
    blocks = [
        line
        for language, _, content in _blocks(page)
        if language in ("", "sh", "bash")
        for line in content.splitlines()
    ]
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = [c for c in [*blocks, *re.findall(r"`([^`]+)`", text)] if c.startswith("fastsft ")]
    return [c for c in found if not re.search(r"[\[<]|\b[A-Z]+\b", c)]


@PAGE
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags exist and have values of their type; nothing is run. A verb alone, ``fastsft dedup``, is a mention."""
    parsed = []

    def stub(verb: str, function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> None:
            inspect.signature(function).bind(*args, **kwargs)
            parsed.append(verb)

        return record

    monkeypatch.setattr(cli, "VERBS", {v: (stub(v, f), config) for v, (f, config) in cli.VERBS.items()})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "run.toml").touch()
    for command in _commands(page):
        verb, *rest = shlex.split(command, comments=True)[1:]
        if rest:
            cli.main([verb, *rest])
            assert parsed.pop() == verb, command
        else:
            assert verb in cli.VERBS or verb == "--help", command


def test_the_readme_has_commands() -> None:
    assert len(_commands(PAGES[0])) >= 5


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model under runs/run/model of a folder, and one of its adapters under runs/run/adapter."""
    from fastsft.models.adapter import save_adapter
    from fastsft.models.lora import LoraConfig, add_lora
    from fastsft.models.tokenizer import Tokenizer
    from fastsft.models.weights import init_model, save_model

    folder = tmp_path_factory.mktemp("docs")
    target = folder / "runs" / "run" / "model"
    target.mkdir(parents=True)
    tokenizer = Tokenizer.train(["def add(a, b): return"], 280, ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))
    fields = {
        "model_type": "qwen2", "vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }  # fmt: skip
    model = init_model(fields, seed=0)
    save_model(model, target)
    tokenizer.save(target)
    add_lora(model, LoraConfig(rank=2), seed=0)
    save_adapter(model, folder / "runs" / "run" / "adapter")
    return folder


def _names(page: str) -> dict[str, Any]:
    """What the blocks of a page take for granted."""
    if page not in ("README.md", "ops.md"):
        return {}
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 50, bias=False)
    ids = torch.randint(50, (7,))
    return {
        "q": torch.randn(7, 4, 32), "k": torch.randn(7, 2, 32), "v": torch.randn(7, 2, 32), "lm_head": head, "ids": ids,
        "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32), "targets": ids.roll(-1), "hidden": torch.randn(7, 32),
        "token_weights": torch.ones(7), "total_weight": 7.0, "backbone": torch.nn.Embedding(50, 32),
    }  # fmt: skip


@PAGE
def test_python_blocks_run(page: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, beside a tiny model; training itself is replaced."""
    import fastsft

    monkeypatch.chdir(model_folder)
    monkeypatch.setattr(type(fastsft.train), "__call__", lambda self, config: None)
    names = _names(page.name)
    for language, options, content in _blocks(page):
        if language == "python" and options != "part":
            exec(compile(content, page.name, "exec"), names)


def _rows_and_samples() -> list[tuple[str, str, str]]:
    """(row, options, sample) of data-format.md: each ``sample`` block belongs to the ``json`` block before it."""
    pairs = []
    row = ""
    for language, options, content in _blocks(ROOT / "docs" / "data-format.md"):
        if language == "json":
            row = content
        elif language == "sample":
            pairs.append((row, options, content.removesuffix("\n")))
    return pairs


@pytest.mark.parametrize(("row", "options", "sample"), _rows_and_samples())
def test_samples_are_what_comes_out(row: str, options: str, sample: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    raw: dict[str, Any] = tomllib.loads(options.replace("; ", "\n"))
    raw |= {"output": str(tmp_path / "run"), "tokenizer": {"train_vocab": 300}}
    raw["data"] = {"train": [str(tmp_path / "rows.jsonl")], "eval_fraction": 0.0, **raw.get("data", {})}
    prepared = prepare(load_config(raw))
    assert len(prepared.train) == 1
    found, inside = "", False
    for token, weight in zip(prepared.train[0].ids.tolist(), prepared.train[0].weights.tolist(), strict=True):
        if (weight > 0) != inside:
            found += "«" if weight > 0 else "»"
            inside = weight > 0
        found += prepared.tokenizer.decode([token], False)
    assert (found + "»" * inside).removesuffix("\n") == sample


def test_there_is_a_sample_of_every_format() -> None:
    assert len(_rows_and_samples()) >= 10


def test_every_reason_is_documented() -> None:
    page = (ROOT / "docs" / "data-format.md").read_text(encoding="utf-8")
    source = "".join((ROOT / "python/fastsft/data" / f).read_text() for f in ("records.py", "tokenise.py", "turns.py"))
    called = re.findall(r'(?:problems\.(?:add|note)\(\s*[^,]+,|UnfitError\()\s*"([^"]+)"', source)
    returned = re.findall(r'return \(?\s*"([a-z ]+)",', source)
    assert len(called) > 8
    assert len(returned) > 2
    for reason in {*called, *returned}:
        assert f"`{reason}`" in page, reason


def _keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default of every leaf."""
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            keys |= _keys(inner, f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = inner
    return keys


def _table(page: str) -> dict[str, str]:
    """Key -> default as written, of all table rows that begin with a key and a default in backquotes."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", text, re.M)
    assert len(dict(rows)) == len(rows), "a key stands twice"
    return {key: default.replace("\\|", "|") for key, default in rows}


def test_every_key_of_a_run_is_documented_with_its_default() -> None:
    expected = {k: "unset" if v is None else json.dumps(v) for k, v in _keys(Config()).items()}
    documented = _table("training.md")
    assert documented.keys() == expected.keys()
    for key, default in expected.items():
        written = documented[key]
        assert written == default or float(written) == float(default), key


@pytest.mark.parametrize(("page", "options"), [("engine.md", SamplingParams()), ("verify.md", Limits())])
def test_options_are_documented_with_their_defaults(page: str, options: Any) -> None:
    expected = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    documented = _table(page)
    assert expected.keys() <= documented.keys()
    for name, default in expected.items():
        assert ast.literal_eval(documented[name]) == default, name
