"""What the weights can do while they are trained: samples, and pass@k on tasks whose answers are executed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fastsft import LLM, SamplingParams
from fastsft.config import Config, ConfigError
from fastsft.models.decoder import Decoder
from fastsft.models.tokenizer import Tokenizer
from fastsft.verify.answers import ask, codes_of
from fastsft.verify.passk import evaluate_tasks
from fastsft.verify.sandbox import run
from fastsft.verify.tasks import read_tasks

Write = Callable[..., None]
"""As ``MetricsLog.write``: kind, step, values."""


class Live:
    """Draws with the engine from the model that is trained. Seeds are its own: the training is not disturbed.

    Raises:
        ConfigError: no tasks in the file, or no sandbox on this machine.
    """

    def __init__(self, config: Config) -> None:
        self._samples, self._eval = config.samples, config.eval
        self._llm: LLM | None = None
        self._tasks = []
        if config.eval.tasks is not None:
            if not Path(config.eval.tasks).is_file():
                raise ConfigError(f"eval.tasks: no file {config.eval.tasks}")
            try:
                self._tasks = read_tasks(config.eval.tasks)
            except ValueError as error:
                raise ConfigError(f"eval.tasks: {error}") from None
            if not self._tasks:
                raise ConfigError(f"eval.tasks: no task in {config.eval.tasks}")
            tried = run("pass")
            if tried.status == "refused":
                raise ConfigError(f"eval.tasks: sandbox: {tried.stderr.strip()}")

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether there is anything to do after this step."""
        return self._draws(step, last) or self._solves(step, last)

    def _draws(self, step: int, last: bool) -> bool:
        return bool(self._samples.prompts or self._samples.chat) and _due(step, self._samples.every, last)

    def _solves(self, step: int, last: bool) -> bool:
        return bool(self._tasks) and _due(step, self._eval.every, last)

    def __call__(
        self, model: Decoder, tokenizer: Tokenizer, step: int, *, last: bool, write: Write, note: Callable[[str], None]
    ) -> None:
        """What is due after this step, 0 before the first.

        Raises:
            ConfigError: a prompt that the model cannot continue.
        """
        llm = self._engine(model, tokenizer)
        if self._draws(step, last):
            self._draw(llm, step, write, note)
        if self._solves(step, last):
            self._solve(llm, step, write, note)

    def _engine(self, model: Decoder, tokenizer: Tokenizer) -> LLM:
        """One for the whole run, with the weights of now."""
        if self._llm is None:
            self._llm = LLM(model, tokenizer)
        else:
            self._llm.update_weights(model)
        return self._llm

    def _draw(self, llm: LLM, step: int, write: Write, note: Callable[[str], None]) -> None:
        options, began = self._samples, time.perf_counter()
        chats = [[{"role": "user", "content": text}] for text in options.chat]
        params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)
        try:
            outputs = llm.generate(options.prompts, params) if options.prompts else []
            outputs += llm.chat(chats, params) if chats else []
        except ValueError as error:
            raise ConfigError(f"samples: {error}") from None
        seconds = (time.perf_counter() - began) / len(outputs)
        for prompt, output in zip([*options.prompts, *options.chat], outputs, strict=True):
            (drawn,) = output.outputs
            write("sample", step, prompt=prompt, text=drawn.text, finish_reason=drawn.finish_reason, seconds=seconds)
            note(f"step {step}: {prompt!r:.60} -> {drawn.text!r:.200}")

    def _solve(self, llm: LLM, step: int, write: Write, note: Callable[[str], None]) -> None:
        options, began = self._eval, time.perf_counter()
        params = SamplingParams(
            n=options.n, temperature=options.temperature, seed=options.seed, max_tokens=options.max_tokens,
            stop=tuple(options.stop),
        )  # fmt: skip
        try:
            outputs = ask(llm, self._tasks, params, completion=options.completion)
        except ValueError as error:
            raise ConfigError(f"eval.tasks: {error}") from None
        codes = codes_of(outputs, completion=options.completion)
        report = evaluate_tasks(self._tasks, codes, k=options.k).to_dict()
        solved = {task["task_id"]: task["passed"] for task in report["tasks"]}
        seconds = time.perf_counter() - began
        write("pass_at_k", step, pass_at=report["pass_at"], statuses=report["statuses"], passed=solved, seconds=seconds)
        shown = ", ".join(f"pass@{k} {value:.3f}" for k, value in report["pass_at"].items())
        note(f"step {step}: {shown} of {len(self._tasks)} tasks")


def _due(step: int, every: int, last: bool) -> bool:
    return step == 0 or last or (every > 0 and step % every == 0)
