"""Single steps of fastsft and llama.cpp for ``bench_engine.py``: what several rows cost, and whether their bits differ
from those of one row alone."""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import engine_files as files
import numpy as np
from engine_case import CONTEXT, Case, model_config

Row = tuple[int, int, int]  # token, sequence, position
MOST = 512  # tokens of a sequence where there are several


class Stepper(Protocol):
    def begin(self, sequences: int) -> None:
        """Forget everything; as many sequences are to come."""

    def decode(self, rows: Sequence[Row], wanted: Sequence[int]) -> list[np.ndarray]:
        """Logits of the wanted rows; rows are in order of their sequences, then positions."""

    def cut(self, length: int) -> None:
        """Forget all positions of sequence 0 from ``length`` on."""


class Fastsft:
    BLOCK = 32

    def __init__(self, case: Case, folder: Path) -> None:
        from fastsft.models.packed import pack_decoder

        self.model = pack_decoder(folder, "w8a8" if case.format == "int8" else case.format)
        self.kv = {"kv_format": case.activations, "block_size": self.BLOCK}
        self.cache: Any = None

    def begin(self, sequences: int) -> None:
        import torch

        each = (CONTEXT if sequences == 1 else MOST) // self.BLOCK
        self.table = torch.arange(sequences * each, dtype=torch.int32).view(sequences, each)
        if self.cache is None or self.cache.shape[1] < sequences * each:
            self.cache = self.model.new_cache(sequences * each, **self.kv)

    def decode(self, rows: Sequence[Row], wanted: Sequence[int]) -> list[np.ndarray]:
        import torch

        sequences = [(s, list(those)) for s, those in itertools.groupby(rows, key=lambda row: row[1])]
        bounds = [0, *itertools.accumulate(len(those) for _, those in sequences)]
        logits = self.model.step(
            torch.tensor([row[0] for row in rows]),
            self.cache,
            self.table[[s for s, _ in sequences]],
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor([those[-1][2] + 1 for _, those in sequences], dtype=torch.int32),
            torch.tensor(wanted),
            **self.kv,
        )
        return list(logits.numpy())

    def cut(self, length: int) -> None:
        """What is written again replaces what was there."""


class LlamaCpp:
    def __init__(self, case: Case, folder: Path) -> None:
        import llama_cpp

        self.lib, self.case = llama_cpp, case
        llama_cpp.llama_backend_init()
        path = files.gguf(folder, case.format)
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}

    def begin(self, sequences: int) -> None:
        lib = self.lib
        if sequences not in self.contexts:
            parameters = lib.llama_context_default_params()
            parameters.n_ctx = CONTEXT if sequences == 1 else sequences * MOST
            parameters.n_seq_max, parameters.n_batch = sequences, CONTEXT
            parameters.n_threads = parameters.n_threads_batch = self.case.threads
            if self.case.format == "float32":
                parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
            self.contexts[sequences] = lib.llama_init_from_model(self.model, parameters)
        self.context = self.contexts[sequences]
        self.memory = lib.llama_get_memory(self.context)
        lib.llama_memory_clear(self.memory, True)

    def decode(self, rows: Sequence[Row], wanted: Sequence[int]) -> list[np.ndarray]:
        lib = self.lib
        batch = lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, sequence, position) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = False
        for i in wanted:
            batch.logits[i] = True
        assert lib.llama_decode(self.context, batch) == 0
        found = [lib.llama_get_logits_ith(self.context, i) for i in wanted]
        lib.llama_batch_free(batch)
        return [np.ctypeslib.as_array(row, (self.vocabulary,)) for row in found]

    def cut(self, length: int) -> None:
        self.lib.llama_memory_seq_rm(self.memory, 0, length, -1)


class Verification:
    def __init__(self, case: Case, stepper: Stepper) -> None:
        self.case, self.stepper = case, stepper

    @classmethod
    def of_fastsft(cls, case: Case, folder: Path) -> Verification:
        return cls(case, Fastsft(case, folder))

    @classmethod
    def of_llama_cpp(cls, case: Case, folder: Path) -> Verification:
        return cls(case, LlamaCpp(case, folder))

    def seconds(self, counts: list[int], context: int, rounds: int) -> dict[int, list[float]]:
        """Of steps with that many rows of one sequence, after ``context`` tokens, in turn."""
        tokens = self._tokens(context + max(counts))
        self.stepper.begin(1)
        self.stepper.decode([(token, 0, p) for p, token in enumerate(tokens[:context])], [context - 1])
        found: dict[int, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for count in counts:
                rows = [(tokens[context + i], 0, context + i) for i in range(count)]
                start = time.perf_counter()
                for logits in self.stepper.decode(rows, range(count)):
                    logits.argmax()
                found[count].append(time.perf_counter() - start)
                self.stepper.cut(context)
        return dict(found)

    def differing_rows(self, count: int) -> float:
        """Share of logits that differ in some bit between one step of ``count`` rows and as many steps of one."""
        context, stepper = 65, self.stepper
        tokens = self._tokens(context + count)
        rows = [(token, 0, p) for p, token in enumerate(tokens)]
        stepper.begin(1)
        stepper.decode(rows[:context], [context - 1])
        together = [x.copy() for x in stepper.decode(rows[context:], range(count))]
        stepper.cut(context)
        alone = [stepper.decode([row], [0])[0].copy() for row in rows[context:]]
        return _differing(together, alone)

    def differing_batch(self, count: int) -> float:
        """The same between ``count`` sequences together and each alone."""
        lengths = [33 + 7 * i for i in range(count)]
        texts = [self._tokens(length + 1, seed=length) for length in lengths]
        stepper = self.stepper
        stepper.begin(count)
        for s, text in enumerate(texts):
            stepper.decode([(token, s, p) for p, token in enumerate(text[:-1])], [len(text) - 2])
        last = [(text[-1], s, len(text) - 1) for s, text in enumerate(texts)]
        together = [x.copy() for x in stepper.decode(last, range(count))]
        alone = []
        for text in texts:
            stepper.begin(1)
            stepper.decode([(token, 0, p) for p, token in enumerate(text[:-1])], [len(text) - 2])
            alone.append(stepper.decode([(text[-1], 0, len(text) - 1)], [0])[0].copy())
        return _differing(together, alone)

    def _tokens(self, count: int, seed: int = 0) -> list[int]:
        generator = random.Random(seed)
        return [generator.randrange(model_config(self.case.size)["vocab_size"]) for _ in range(count)]


def _differing(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    pairs = zip(a, b, strict=True)
    return float(np.mean([np.mean(x.view(np.uint32) != y.view(np.uint32)) for x, y in pairs]))
