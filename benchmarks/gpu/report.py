"""gpu.json, the lines that are printed while the check runs, and its tables."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu.record import Entry
from common.tables import markdown_table


def finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON lacks: as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def verdict(entry: Entry) -> str:
    """pass, FAIL, or nothing where there is none."""
    passed = entry.get("passed")
    return "" if passed is None else "pass" if passed else "FAIL"


def measured(entry: Entry) -> str:
    """What an entry says, in short."""
    if "text" in entry:
        return entry["text"]
    if "values" in entry:
        return ", ".join(
            f"{key} {shown(value)}" for key, value in entry["values"].items() if not isinstance(value, list | dict)
        )
    why = f" ({entry['why']})" if entry.get("why") else ""
    return f"{shown(entry['value'])}{why}" if "value" in entry else entry.get("why", "")


def line(part: str, entry: Entry) -> str:
    """One line of the run."""
    bound = f" {entry['sign']} {shown(entry['bound'])}" if "bound" in entry else ""
    return f"{verdict(entry):4}  {part}: {entry['name']}: {measured(entry)}{bound}"


def failures(parts: Mapping[str, Any]) -> int:
    """Failed checks and parts; one that did not begin for lack of time is none."""
    checks = sum(entry.get("passed") is False for part in parts.values() for entry in part["entries"])
    return checks + sum(part["status"] == "failed" for part in parts.values())


def tables(results: Mapping[str, Any]) -> str:
    """The whole run in Markdown: versions, every value with its bound, and the longer lists."""
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    rows = []
    for name, part in results["parts"].items():
        took = f"{part['seconds']:.0f} s" if part["status"] != "not begun" else ""
        problem = f": {part['problem']}" if part.get("problem") else ""
        rows.append([f"**{name}**", f"{part['status']}{problem}", took, "FAIL" if part["status"] == "failed" else ""])
        for entry in part["entries"]:
            bound = f"{entry['sign']} {shown(entry['bound'])}" if "bound" in entry else ""
            rows.append([entry["name"], measured(entry), bound, verdict(entry)])
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    text = f"{versions}.\n\n{markdown_table(['', 'measured', 'bound', ''], escaped)}\n"
    return text + "".join(_lists(results["parts"]))


def _lists(parts: Mapping[str, Any]) -> Iterable[str]:
    for part in parts.values():
        for entry in part["entries"]:
            for key, items in entry.get("values", {}).items():
                if isinstance(items, list) and items:
                    rows = [[shown(value).replace("|", "\\|") for value in item.values()] for item in items]
                    yield f"\n{entry['name']}, {key}:\n\n{markdown_table(list(items[0]), rows)}\n"


def as_json(results: Mapping[str, Any]) -> dict[str, Any]:
    """What gpu.json holds."""
    return json.loads(json.dumps(finite(dict(results))))
