"""A comparison of `fidelity.compare` to read: a table for terminals, and a page with plots.

The page is one file that needs no other and no network; the parts of its plots, SVG written here,
tell their numbers under the pointer. What comes from texts and folders is escaped.
"""

import html
from collections.abc import Callable, Iterable, Sequence

WIDTH, HEIGHT, LEFT, BELOW = 600, 250, 44, 34  # of plots, and what their axes take
SATURATED = 2.0  # nats of KL that have the full colour
LOSSES = {  # title: what `compare` calls it
    "nats per token": "loss_per_token",
    "nats per character": "loss_per_character",
    "perplexity per token": "perplexity",
}
COLUMNS = (
    ("output", "cosine"),
    ("delta", "delta_cosine"),
    ("top-1", "top1"),
    ("weighted", "top1_weighted"),
    ("set", "set"),
    ("weighted", "set_weighted"),
)

# --- In a terminal --------------------------------------------------------------------------------


def table(found: dict) -> str:
    """The comparison in lines: of the models, of each layer, of each family of matrices."""
    teacher, student, layers = found["teacher"], found["student"], found["layers"]
    row = "{:<22}{:>12}{:>12}".format
    lines = [row("", "teacher", "student")]
    lines += [row(t, _loss(teacher[k]), _loss(student[k])) for t, k in LOSSES.items()]
    lines += [row("activations", teacher["activations"], student["activations"])]
    lines += [row("KL(teacher||student)", "", f"{found['kl']:.4f}") + " nats per token"]
    lines += [row("same likeliest token", "", f"{found['agreement']:.4f}")]
    lines += [row("tokens", "", f"{found['tokens']:,}")]
    columns = [(title, key) for title, key in COLUMNS if key in layers[0]]
    routed = "load" in layers[0]
    titles = [title for title, _ in columns] + ["moved"] * routed + list(found["families"])
    lines += ["", "layer" + "".join(map("{:>10}".format, titles))]
    for layer in layers:
        values = [layer[key] for _, key in columns]
        values += [moved(layer["load"])] if routed else []
        values += layer["error"].values()
        lines.append(f"{layer['layer']:>5}" + "".join(map("{:>10.4f}".format, values)))
    lines += ["", f"{'family':<14}{'weights':>18}{'error':>10}"]
    for name, family in found["families"].items():
        lines.append(f"{name:<14}{family['weights']:>18,}{family['error']:>10.4f}")
    return "\n".join(lines)


def _loss(value: float) -> str:
    return f"{value:.4f}" if value < 1e5 else f"{value:.4g}"


def moved(load: dict) -> float:
    """The share of the student's choices that would have to go to other experts for the load to
    be the teacher's."""
    pairs = zip(load["teacher"], load["student"], strict=True)
    return sum(abs(a - b) for a, b in pairs) / 2


# --- Plots ----------------------------------------------------------------------------------------


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _figure(title: str, about: str, *contents: str) -> str:
    heading = f"<h2>{html.escape(title)}</h2><p>{html.escape(about)}</p>"
    return f"<figure>{heading}{''.join(contents)}</figure>"


def curves(series: dict[str, Sequence[float]], low: float, high: float) -> str:
    """Values of each layer, a line for each name, on an axis from low to high."""
    count = len(next(iter(series.values())))

    def x(i):
        return LEFT + (WIDTH - LEFT) * (i + 0.5) / count

    def y(value):
        return 8 + (HEIGHT - BELOW - 8) * (high - value) / (high - low)

    parts = [_text((LEFT + WIDTH) / 2, HEIGHT - 2, "layer")]
    for value in (low + (high - low) * k / 4 for k in range(5)):
        parts.append(_line(LEFT, y(value), WIDTH, y(value), "grid"))
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:.3g}", "end"))
    parts += [_text(x(i), HEIGHT - BELOW + 16, str(i)) for i in range(0, count, -(-count // 16))]
    keys = []
    for n, (name, values) in enumerate(series.items()):
        keys.append(f'<span><i class="s{n}"></i>{html.escape(name)}</span>')
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        parts.append(f'<polyline class="s{n}" points="{points}"/>')
        parts += [
            f'<circle class="s{n}" cx="{x(i):.1f}" cy="{y(v):.1f}" r="3.5">'
            f"<title>{html.escape(name)}, layer {i}: {v:.4f}</title></circle>"
            for i, v in enumerate(values)
        ]
    return f'<div class="keys">{"".join(keys)}</div>{_svg(WIDTH, HEIGHT, parts)}'


def _tenth(values: dict[str, Sequence[float]], pick: Callable, step: int) -> float:
    """The tenth that an axis ends at: the next one below the least value, or above the largest."""
    return (pick(map(pick, values.values())) * 10 // 1 + step) / 10


def loads(layers: Sequence[dict], name: str) -> str:
    """A cell for each expert, from the top, of each layer, coloured by load over an even share."""
    experts, high, left = len(layers[0]["load"][name]), 15, 56
    wide = min(40, (WIDTH - left) / len(layers))
    parts = [_text(left - 6, high * (experts + 1) / 2, name, "end")]
    for i, layer in enumerate(layers):
        for e, share in enumerate(layer["load"][name]):
            above = max(-1.0, min(1.0, share * experts - 1))  # 0 when even
            parts.append(
                f'<rect class="{"over" if above > 0 else "under"}" x="{left + i * wide:.1f}" '
                f'y="{e * high}" width="{wide:.1f}" height="{high}" '
                f'fill-opacity="{abs(above):.2f}"><title>layer {i}, expert {e}: {share:.4f}'
                "</title></rect>"
            )
    return _svg(WIDTH, high * experts + 8, parts)


def histogram(title: str, counts: Sequence[int], trits: bool, reach: float) -> str:
    """The teacher's weights; in trits of the student, with the thresholds between these."""
    width, height, largest = 190, 80, max(*counts, 1)
    step = width / len(counts)

    def x(value):
        return width * (value / reach + 1) / 2

    bars = (
        f"M{i * step:.1f} {height}v{-height * count / largest:.1f}h{step:.2f}V{height}z"
        for i, count in enumerate(counts)
    )
    parts = [f'<path class="bars" d="{"".join(bars)}"/>']
    parts += [_line(x(t), 0, x(t), height, "mark") for t in ((-0.5, 0.5) if trits else ())]
    parts += [_text(x(v), height + 12, str(v)) for v in (-3, -2, -1, 0, 1, 2, 3)]
    caption = f"{title}, in {'trits' if trits else 'rms'}"
    return f"<div><small>{html.escape(caption)}</small>{_svg(width, height + 14, parts)}</div>"


# --- The page -------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#667080;--back:#fff;--card:#f5f6f8;--grid:#dde1e7;
--c0:#2563eb;--c1:#dc6803;--c2:#0d9488;--c3:#b4239f}
@media(prefers-color-scheme:dark){:root{--ink:#e7eaf0;--dim:#9aa4b2;--back:#14171c;--card:#1d2129;
--grid:#333a45;--c0:#6ea0ff;--c1:#f79a3e;--c2:#3cc9b9;--c3:#e879d4}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;
max-width:1280px;padding:24px 28px 60px}h1{font-size:23px;margin:0}
h2{font-size:17px;margin:28px 0 0}p,small{color:var(--dim);font-size:13px;margin:0 0 8px}
code{overflow-wrap:anywhere}figure{margin:0}
.row{display:flex;flex-wrap:wrap;gap:10px 44px}.row figure{width:600px}
.cards{gap:12px;margin-top:16px}.cards div{background:var(--card);border-radius:8px;
padding:9px 16px}.cards b{display:block;font-size:20px}.small{gap:10px 26px}
svg{display:block;max-width:100%;height:auto;font:11px system-ui,sans-serif}text{fill:var(--dim)}
.grid,rect{stroke:var(--grid)}.mark{stroke:var(--c1);stroke-width:1.6}.bars{fill:var(--c0);
opacity:.55}polyline{fill:none;stroke-width:2}.over{fill:var(--c1)}.under{fill:var(--c0)}
.keys{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:13px}
.keys i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}
polyline{stroke:var(--c)}circle{fill:var(--c)}i{background:var(--c)}
.text{white-space:pre-wrap;font:14px/1.75 ui-monospace,monospace;background:var(--card);
border-radius:8px;padding:14px 18px;overflow-wrap:anywhere}.text span{border-radius:2px}
.text span:hover{outline:2px solid var(--c0)}
"""


def page(found: dict) -> str:
    """The comparison as an HTML page."""
    layers, families = found["layers"], found["families"]

    def plot(*keys):
        names = {"cosine": "output", "delta_cosine": "what the layer added", "set": "all experts"}
        names |= {"top1": "first expert", "top1_weighted": "first expert, weighted"}
        names |= {"set_weighted": "all experts, weighted"}
        series = {names[key]: [layer[key] for layer in layers] for key in keys}
        return curves(series, min(0.9, _tenth(series, min, 0)), 1)

    figures = [
        _figure(
            "Hidden states",
            "Cosine of the outputs that a layer has in both models, and of what it adds to its "
            "input; means over tokens.",
            plot("cosine", "delta_cosine"),
        )
    ]
    if "load" in layers[0]:
        figures += [
            _figure(
                "Routing",
                "Share of tokens that both send to the same experts; weighted, each token counts "
                "by how far the teacher's last choice is ahead of the next one.",
                plot("top1", "top1_weighted", "set", "set_weighted"),
            ),
            _figure(
                "Load of experts",
                "Share of the choices of each, from left to right by layer: without colour it is "
                "even, full orange twice that or more, full blue none.",
                loads(layers, "teacher"),
                loads(layers, "student"),
            ),
        ]
    errors = {name: [layer["error"][name] for layer in layers] for name in families}
    about = "Squared error of the student's weights, relative to the teacher's squares."
    figures.append(_figure("Weights", about, curves(errors, 0, _tenth(errors, max, 1))))
    histograms = [
        histogram(f"{family}, layer {i}", reach=found["reach"], **layer["histograms"][family])
        for family in families
        for i, layer in enumerate(layers)
    ]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>What the student lost</title><style>{STYLE}</style></head><body>{_summary(found)}"
        f'<div class="row">{"".join(figures)}</div>'
        + _figure(
            "What the weights were",
            "The teacher's weights; where the student is ternary, in multiples of what its trits "
            "stand for: rounded, they are 0 between the lines. The outer bars hold what is beyond.",
            f'<div class="row small">{"".join(histograms)}</div>',
        )
        + _figure(
            "The text",
            f"Its first {len(found['sample']):,} tokens, coloured by how the predictions of each "
            f"differ, fully at a KL of {SATURATED:g} nats. Under the pointer is what they were.",
            f'<div class="text">{"".join(map(_token, found["sample"]))}</div>',
        )
        + "</body></html>\n"
    )


def _summary(found: dict) -> str:
    teacher, student = found["teacher"], found["student"]
    cards = {
        "KL(teacher ‖ student), nats per token": f"{found['kl']:.4f}",
        "same likeliest token": f"{100 * found['agreement']:.1f} %",
        **{
            title: f"{_loss(teacher[key])} → {_loss(student[key])}" for title, key in LOSSES.items()
        },
    }
    cards = (f"<div><b>{value}</b><small>{title}</small></div>" for title, value in cards.items())
    teacher, student = (
        f"<code>{html.escape(model['folder'])}</code> ({model['activations']} activations)"
        for model in (teacher, student)
    )
    return (
        f"<h1>What the student lost</h1><p>Teacher {teacher}, student {student}, each on hidden "
        f"states of its own: {found['tokens']:,} tokens, {found['characters']:,} characters.</p>"
        f'<div class="row cards">{"".join(cards)}</div>'
    )


def _token(one: dict) -> str:
    """A token of the sample, coloured; under the pointer, what both models expected there."""

    def shown(piece):
        return f"‘{piece}’".replace("\n", "⏎")

    lines = [f"{shown(one['text'])}, KL {one['kl']:.3f}"]
    for name in ("teacher", "student"):
        expected = (f"{shown(piece)} {100 * p:.1f} %" for piece, p in one[name])
        lines.append(f"{name}: {', '.join(expected)}")
    alpha = max(0.0, min(1.0, one["kl"] / SATURATED))
    text = one["text"].replace("\n", "⏎\n")
    style = f"background:rgba(220,104,3,{alpha:.2f})"
    title = html.escape("\n".join(lines))
    return f'<span style="{style}" title="{title}">{html.escape(text)}</span>'
