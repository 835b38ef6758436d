"""Draws architecture.svg, the picture of design.md: ``make docs``, or this file alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURE = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT = 960, 590
DATA, MODEL, OPS, NATIVE, OUTSIDE = "#e3f0fb", "#e8f5e6", "#fdf0d5", "#f9e2dd", "#f3f3f3"
_STYLE = """\
<style>
  text { font-family: system-ui, sans-serif; font-size: 13px; fill: #1f2328; }
  .name { font-weight: 600; font-size: 15px; } .note { font-size: 12px; fill: #57606a; }
  rect { stroke: #8c959f; rx: 6px; } path { fill: none; stroke: #57606a; stroke-width: 1.5; marker-end: url(#tip); }
</style>
<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0,0 L8,4 L0,8" style="fill:#57606a;stroke:none;marker-end:none"/></marker>"""


def box(x: int, y: int, width: int, height: int, colour: str, name: str, *lines: str) -> str:
    """A rectangle with a name and lines of text, all centred."""
    top = y + height / 2 - 9 * len(lines) + 5
    text = [f'<text class="name" x="{x + width / 2:g}" y="{top:g}" text-anchor="middle">{escape(name)}</text>']
    text += [note(x + width // 2, int(top) + 18 * (i + 1), line) for i, line in enumerate(lines)]
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>' + "".join(text)


def note(x: int, y: int, text: str) -> str:
    return f'<text class="note" x="{x}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def arrow(*points: tuple[int, int]) -> str:
    return '<path d="M' + " L".join(f"{x},{y}" for x, y in points) + '"/>'


def picture() -> str:
    """The whole file."""
    parts = [
        # What a run goes through, from left to right, and back.
        box(20, 70, 190, 110, DATA, "data", "records, dedup, chat masks,", "infilling, mixtures,", "packing"),
        box(270, 70, 190, 110, DATA, "train", "objectives, stages, adapters,", "exact resume,", "several processes"),
        box(520, 70, 190, 110, DATA, "engine",
            "paged cache, batching,", "speculation, adapters,", "OpenAI's API over HTTP"),
        box(770, 70, 170, 110, DATA, "verify", "sandboxed execution", "of what was written,", "pass@k"),
        arrow((210, 125), (268, 125)),
        note(239, 115, "batches"),
        arrow((460, 125), (518, 125)),
        note(489, 115, "folder"),
        arrow((710, 125), (768, 125)),
        note(739, 115, "code"),
        arrow((855, 70), (855, 35), (115, 35), (115, 68)),
        note(485, 26, "synthesis: samples that passed become rows"),
        # What they stand on.
        box(20, 230, 190, 90, OUTSIDE, "your trainer", "a loop of your own, or", "transformers, TRL", "(integrations)"),
        box(
            270, 230, 440, 90, MODEL, "models",
            "Hugging Face folders: Llama, Qwen2/2.5, Qwen3, Mistral",
            "decoder, tokenizer, chat template, LoRA, packed weights",
        ),
        arrow((365, 180), (365, 228)),
        arrow((615, 180), (615, 228)),
        box(
            20, 370, 920, 80, OPS, "ops",
            "attention · linear cross-entropy · norm, RoPE, SwiGLU · decoding and sampling "
            "· infilling · MinHash, LSH · packing",
            "torch functions with autograd and torch.compile; each with "
            "a plain reference that is specification, oracle and baseline",
        ),
        arrow((115, 320), (115, 368)),
        arrow((490, 320), (490, 368)),
        arrow((210, 165), (240, 165), (240, 368)),
        # Native code.
        box(20, 500, 290, 70, NATIVE, "csrc/cpu",
            "C++20, once per instruction set:", "portable, AVX2, AVX-512, AVX-512 bfloat16"),
        box(335, 500, 290, 70, NATIVE, "csrc/cuda",
            "sm_80 and up, Hopper kernels;", "optional, tested on an emulation"),
        box(650, 500, 290, 70, NATIVE, "ops/_triton, torch",
            "what only moves memory on a GPU;", "what has no kernel there"),
        arrow((165, 450), (165, 498)),
        arrow((480, 450), (480, 498)),
        arrow((795, 450), (795, 498)),
        note(322, 480, "_C: pybind11 and DLPack, no libtorch"),
    ]  # fmt: skip
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Architecture"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, _STYLE, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *parts, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
