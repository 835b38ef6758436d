"""What a report says to people, line by line."""

from __future__ import annotations

from typing import Any

_USED = {
    "truncated": "shortened", "special token text": "used", "masked e-mail": "changed", "masked ip": "changed",
}  # fmt: skip


def notices(report: dict[str, Any]) -> list[str]:
    """Lines for people: settings without effect, and the rows that are not, or not wholly, used: how many, why, and the
    first of each kind."""
    places = report.get("skipped_examples", {})
    lines = list(report.get("without_effect", []))
    for reason, count in report.get("skipped", {}).items():
        what = _USED.get(reason, "left out")
        lines.append(f"{what}: {count} x {reason}, e.g. {places[reason][0]}")
    infilled = report.get("infilling", {})
    if infilled.get("pieces"):
        why = infilled["why_pieces"] or "not in the normal form, with an added token or one long run"
        lines.append(
            f"infilling: {infilled['pieces']} of {infilled['texts']} texts cut and encoded piece by piece: {why}"
        )
    for kind in ("exact", "near"):
        if count := report.get("dedup", {}).get(f"{kind}_duplicates"):
            lines.append(f"left out: {count} x {kind} duplicate")
    if dropped := report.get("decontaminate", {}).get("dropped"):
        first = dropped[0]
        lines.append(
            f"left out: {len(dropped)} x in evaluation files, e.g. {first['source']}: {first['coverage']:.0%} of "
            f"{first['evaluation']}"
        )
    return lines
