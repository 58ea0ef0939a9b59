"""Results as a table in Markdown and as plots in SVG."""

import html
import math

PARTIES = {
    "skep": "#c77d0a",
    "libtorch alone": "#999999",
    "hivemind": "#3b6ea5",
    "hivemind client, skep server": "#7fb069",
    "torch rpc": "#8e5ea2",
    "TLS alone": "#bbbbbb",
    "TCP alone": "#dddddd",
}


def number(value):
    """Three digits that count."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    scale = 10 ** max(0, math.floor(math.log10(abs(value))) - 2)
    text = f"{round(value / scale) * scale if scale > 1 else value:.{digits}f}"
    return f"{int(float(text)):,}".replace(",", " ") if digits == 0 else text


def spread(measure):
    low, median, high = (number(measure[key]) for key in ("min", "median", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def ratio(work, party):
    measures, inverse = work["measures"], work["unit"] == "s"
    if party == "skep" or party not in measures or "skep" not in measures:
        return ""
    ours, theirs = measures["skep"]["median"], measures[party]["median"]
    times = theirs / ours if inverse else ours / theirs
    return f"{times * 100:.0f} %" if party.endswith("alone") else f"{number(times)} ×"


def table(results):
    load = f"The load average was {results['load']:.1f} when it began: other programs ran beside it, or shortly before. "
    lines = [
        (load if results["load"] > 0.5 else "") + f"{results['processor']}, {results['cores']} cores, {results['rounds']} rounds, {results['seconds']} s in all. "
        "Median, and in brackets the lowest and highest round.",
        "",
        "| work | party | rate or time | p50 of a call | skep against it |",
        "|---|---|---|---|---|",
    ]
    for name, work in results["works"].items():
        title = name
        for party, measure in work["measures"].items():
            if party not in PARTIES:
                continue
            p50 = work["measures"].get(f"{party} p50 µs")
            latency = f"{number(p50['median'])} µs" if p50 else ""
            lines.append(f"| {title} | {party} | {spread(measure)} {work['unit']} | {latency} | {ratio(work, party)} |")
            title = ""
        for extra, measure in work["measures"].items():
            if extra not in PARTIES and not extra.endswith("p50 µs"):
                lines.append(f"| | {extra} | {spread(measure)} | | |")
    return "\n".join(lines + [f"\nFailed: {each.splitlines()[0]}" for each in results["failures"]])


def plot(title, unit, bars):
    """Bars on a logarithmic axis; each has its party, lowest, median and highest value."""
    width, left, row = 760, 220, 26
    low = 10 ** math.floor(math.log10(min(bar[1]["min"] for bar in bars)))
    high = 10 ** math.ceil(math.log10(max(bar[1]["max"] for bar in bars) * 1.01))
    x = lambda value: left + (width - left - 90) * math.log10(value / low) / math.log10(high / low)
    height = 40 + row * len(bars)
    parts = [f'<text x="10" y="20" font-weight="bold">{html.escape(title)}, {html.escape(unit)}</text>']
    for at, (party, measure) in enumerate(bars):
        y = 34 + at * row
        end, median = x(measure["max"]), measure["median"]
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{html.escape(party)}</text>',
            f'<rect x="{left}" y="{y}" width="{max(1, x(median) - left):.1f}" height="18" fill="{PARTIES[party]}"/>',
            f'<line x1="{x(measure["min"]):.1f}" x2="{end:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="#222"/>',
            f'<text x="{max(end, x(median)) + 6:.1f}" y="{y + 14}">{number(median)}</text>',
        ]
    return height, parts


def figure(works):
    offset, parts = 0, []
    for name, work in works:
        bars = [(party, measure) for party, measure in work["measures"].items() if party in PARTIES]
        height, each = plot(name, f"{work['unit']}, logarithmic", bars)
        parts.append(f'<g transform="translate(0 {offset})">' + "".join(each) + "</g>")
        offset += height + 14
    style = "font-family:sans-serif;font-size:12px;fill:#222"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {offset}" style="{style}">'
    return head + f'<rect width="760" height="{offset}" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"


def write(results, folder):
    head = "<!-- Written by scripts/compare_peers; do not edit. -->\n\n# skep beside others\n\n"
    plots = "\n![Calls per second](performance-calls.svg)\n\n![Mixtures and DHT](performance-mixtures.svg)\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "performance-table.md").write_text(head + table(results) + "\n" + plots)
    works = [(name, work) for name, work in results["works"].items() if work["unit"] != "s"]
    calls = [each for each in works if each[1]["unit"] == "calls/s"]
    others = [each for each in works if each[1]["unit"] != "calls/s"]
    (folder / "performance-calls.svg").write_text(figure(calls))
    (folder / "performance-mixtures.svg").write_text(figure(others))
