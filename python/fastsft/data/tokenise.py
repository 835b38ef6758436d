"""Records to samples: laid out, encoded in batches, made to fit, and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from fastsft.config import Config
from fastsft.data import fim
from fastsft.data.batch import Sample
from fastsft.data.chat import ChatDraft, Draft, draft
from fastsft.data.rearrange import Rearranged, rearrange
from fastsft.data.records import DataError, Problems, Record
from fastsft.data.segments import Part, Segment, join, token_segments, weigh
from fastsft.data.turns import UnfitError, expand
from fastsft.models.control import RESERVED
from fastsft.models.fim import Fim
from fastsft.models.template import TemplateError
from fastsft.models.tokenizer import Tokenizer

_CHUNK = 512


def tokenise(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: Config,
    problems: Problems,
    *,
    limit: str = "data.max_length",
    first: int = 0,
    infilled: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Samples of the usable records, in order; the rest goes to ``problems``.

    Args:
        first: the number of the first record, where these are a part of all: random draws depend on it.
        infilled: gets the number of texts, and of those rearranged by "fim_rows" and by "pieces" encoded one by one.
        limit: what data.max_length stands for, in messages.
    """
    options = config.data
    needs_fim = options.fim.rate > 0 or any(r.kind == "fim" for r in records)
    marks = fim.find_format(tokenizer, options.fim) if needs_fim else None
    counts: Counter[str] = Counter() if infilled is None else infilled
    for begin in range(0, len(records), _CHUNK):
        chunk = []
        for index, record in enumerate(records[begin : begin + _CHUNK], first + begin):
            if any(RESERVED.search(part) for part in record.parts):
                problems.add(record.source, "noncharacter", "one of U+FDD0 to U+FDD3, which mark control tokens here")
            else:
                chunk.append((index, _weighted(record, options.skills)))
        drafts: list[tuple[Record, Draft | ChatDraft | Rearranged]] = []
        native = _rearranged(chunk, tokenizer, marks, config)
        for index, record in chunk:
            try:
                found = native.get(index)
                mine = _drafts(record, index, tokenizer, marks, config) if found is None else [found]
                drafts += [(record, d) for d in mine]
                if record.kind == "text":
                    counts["texts"] += 1
                    if mine[0].context is not None:
                        counts["pieces" if found is None else "fim_rows"] += 1
            except UnfitError as error:
                problems.add(record.source, error.reason, error.detail)
            except TemplateError as error:
                problems.add(record.source, "chat template", str(error).removeprefix("chat template: "))
        encoded = encode([d for _, d in drafts if not isinstance(d, Rearranged)], tokenizer)
        for record, laid in drafts:
            parts = laid.parts if isinstance(laid, Rearranged) else next(encoded)
            sample = _finish(record, laid, parts, tokenizer, config, problems, limit)
            if sample is not None:
                yield sample


def _weighted(record: Record, skills: Mapping[str, float]) -> Record:
    """Times the mean of its skills' weights."""
    if not skills or not record.skills:
        return record
    return replace(record, weight=record.weight * fmean(skills.get(skill, 1.0) for skill in record.skills))


def _rearranged(
    chunk: Sequence[tuple[int, Record]], tokenizer: Tokenizer, marks: Fim | None, config: Config
) -> dict[int, Rearranged | None]:
    """The texts of a chunk by their numbers, where the vocabulary can be encoded natively."""
    texts = {index: record for index, record in chunk if record.kind == "text"}
    if marks is None or config.data.fim.rate == 0 or tokenizer.not_native is not None or not texts:
        return {}
    return dict(zip(texts, rearrange([*texts.values()], [*texts], tokenizer, marks, config), strict=True))


def _drafts(
    record: Record, index: int, tokenizer: Tokenizer, marks: Fim | None, config: Config
) -> list[Draft | ChatDraft]:
    """One for each sample that the record becomes."""
    options = config.data.fim
    if marks is not None and record.kind == "fim":
        return [fim.draft_record(record, tokenizer, marks)]
    if marks is not None and record.kind == "text":
        (text,) = record.parts
        room = config.data.max_length - len(tokenizer.prefix_ids) - fim.MARKERS
        cut = fim.cut(
            text, seed=config.seed, index=index, rate=options.rate, spm_rate=options.spm_rate, spans=options.spans,
            tokenizer=tokenizer,
            # Only the head fits, so that is what the places are drawn in: the middle and its end are then kept.
            head=(lambda whole: tokenizer.head(whole, room)) if config.data.on_long == "truncate" else None,
        )  # fmt: skip
        if cut is not None:
            prefix, middle, suffix, spm = cut
            whole = fim.draft_fim(
                (prefix, middle, suffix), tokenizer, marks, spm=spm, train_context=True, weight=record.weight,
                shortened=len(prefix + middle + suffix) < len(text),
            )  # fmt: skip
            return [whole]
    if record.kind == "messages":
        conversations = [replace(record, messages=part) for part in expand(record.messages, config.data)]
        return [draft(conversation, tokenizer, config.data) for conversation in conversations]
    return [draft(record, tokenizer, config.data)]


def encode(drafts: Sequence[Draft | ChatDraft], tokenizer: Tokenizer) -> Iterator[list[Part]]:
    """The tokens of each draft's pieces, in one batch call for each form; a conversation is a single piece.

    The tokenizer shares a batch out among all cores, whatever the lengths of its texts.
    """
    texts: dict[str, list[str]] = {"prompt": [], "start": [], "inner": []}
    divided: dict[str, list[str]] = {"start": [], "inner": []}  # into ranges
    for d in drafts:
        for piece in d.pieces if isinstance(d, Draft) else ():
            if isinstance(piece.content, str):
                (divided if piece.ranges else texts)[piece.form].append(piece.content)
    rendered = iter(tokenizer.encode_rendered([d.text for d in drafts if isinstance(d, ChatDraft)]))
    encoded = {
        "prompt": iter(tokenizer.encode_batch(texts["prompt"])),
        "start": iter(tokenizer.encode_text(texts["start"])),
        "inner": iter(tokenizer.encode_text(texts["inner"], continues=True)),
    }
    located = {
        form: iter(tokenizer.encode_rendered(some, continues=form == "inner")) for form, some in divided.items() if some
    }
    for d in drafts:
        if isinstance(d, ChatDraft):
            ids, offsets = next(rendered)
            segments, factors = token_segments(offsets, d.ranges, Segment.PROMPT)
            yield [weigh(ids, segments, d.weights, factors, d.weight)]
            continue
        parts: list[Part] = []
        for p in d.pieces:
            if p.ranges:
                ids, offsets = next(located[p.form])
                segments, factors = token_segments(offsets, p.ranges, p.segment)
                parts.append(weigh(ids, segments, d.weights, factors, d.weight))
            else:
                ids = [p.content] if isinstance(p.content, int) else next(encoded[p.form])
                parts.append(weigh(ids, p.segment, d.weights, p.weight, d.weight))
        yield parts


def _finish(
    record: Record,
    laid: Draft | ChatDraft | Rearranged,
    parts: list[Part],
    tokenizer: Tokenizer,
    config: Config,
    problems: Problems,
    limit: str,
) -> Sample | None:
    options = config.data
    context, shortened = laid.context, laid.shortened
    whole = join(parts)
    if len(whole.ids) > options.max_length:
        detail = f"{len(whole.ids)} tokens, {limit} is {options.max_length}"
        if options.on_long == "fail":
            raise DataError(f"{record.source}: too long: {detail}")
        fitting = fim.shorten(parts, context, options.max_length) if context else parts
        if options.on_long == "skip" or fitting is None:
            problems.note(record.source, "too long", detail)
            return None
        shortened = True
        whole = join(fitting)
        edge = whole.weights[options.max_length - 1 : options.max_length + 1]
        if record.kind != "text" and len(edge) == 2 and (edge > 0).all():
            problems.add(record.source, "truncated answer", f"{detail}, which ends within what is trained")
            return None
        whole = whole.take(slice(options.max_length))
    if shortened:
        problems.note(record.source, "truncated", f"to {limit}, {options.max_length} tokens")
    if tokenizer.bos_id is not None and whole.ids[:2].tolist() == [tokenizer.bos_id] * 2:
        problems.add(record.source, "double BOS", "the chat template and the tokenizer both add one")
        return None
    if not (whole.weights[1:] > 0).any():
        problems.add(record.source, "nothing to train on", "every target has weight 0")
        return None
    # A prompt is left out: there a special token's text is the token, as at inference.
    content = record.parts[1] if record.kind == "prompt_completion" else record.text()
    if (name := tokenizer.control.first_in(content)) is not None:
        problems.note(record.source, "special token text", f"{name} in the content is encoded as plain text")
    return Sample(whole.ids, whole.weights, record.source, record.origin, whole.segments, record.skills)
