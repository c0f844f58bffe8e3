"""A comparison of `fidelity.compare` to read: a table for terminals, and a page with plots.

The page is one file that needs no other and no network: SVG that is written here, whose parts tell
their numbers under the pointer. What comes from texts and checkpoints is escaped.
"""

import html
from collections.abc import Iterable, Sequence

WIDTH, HEIGHT, MARGIN = 640, 260, 46  # of plots, and what their axes take
SATURATED = 2.0  # nats of KL that have the full colour
COLUMNS = (  # title in the table, and what `compare` calls it
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
    both = found["teacher"], found["student"]
    lines = [f"{'':<22}{'teacher':>12}{'student':>12}"]
    lines += [
        f"{title:<22}{both[0][key]:>12.4f}{both[1][key]:>12.4f}{unit}"
        for title, key, unit in (
            ("loss per token", "loss_per_token", " nats"),
            ("loss per character", "loss_per_character", " nats"),
            ("perplexity per token", "perplexity", ""),
        )
    ]
    lines.append(f"{'activations':<22}{both[0]['activations']:>12}{both[1]['activations']:>12}")
    lines.append(f"{'KL(teacher||student)':<22}{found['kl']:>24.4f} nats per token")
    lines.append(f"{'same likeliest token':<22}{found['agreement']:>24.4f}")
    lines.append(f"{'tokens':<22}{found['tokens']:>24,}")
    columns = [(title, key) for title, key in COLUMNS if key in found["layers"][0]]
    routed = "load" in found["layers"][0]
    titles = [title for title, _ in columns] + ["moved"] * routed + list(found["families"])
    lines += ["", "layer" + "".join(map("{:>10}".format, titles))]
    for layer in found["layers"]:
        values = [layer[key] for _, key in columns]
        values += [moved(layer["load"])] if routed else []
        values += layer["error"].values()
        lines.append(f"{layer['layer']:>5}" + "".join(map("{:>10.4f}".format, values)))
    lines += ["", f"{'family':<14}{'weights':>18}{'error':>10}"]
    for name, family in found["families"].items():
        lines.append(f"{name:<14}{family['weights']:>18,}{family['error']:>10.4f}")
    return "\n".join(lines)


def moved(load: dict) -> float:
    """The share of the student's choices that would have to go to other experts for the load to
    be the teacher's."""
    pairs = zip(load["teacher"], load["student"], strict=True)
    return sum(abs(a - b) for a, b in pairs) / 2


# --- Plots ----------------------------------------------------------------------------------------


def _svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _titled(tag: str, title: str) -> str:
    """An element <tag ...> that tells a title under the pointer."""
    return f"<{tag}><title>{html.escape(title)}</title></{tag.split(' ', 1)[0]}>"


def lines(series: dict[str, Sequence[float]], label: str, low: float, high: float) -> str:
    """Values of each layer, a line for each name, on an axis from low to high."""
    count = len(next(iter(series.values())))

    def x(i):
        return MARGIN + (WIDTH - MARGIN - 12) * (i + 0.5) / count

    def y(value):
        return HEIGHT - 32 - (HEIGHT - 44) * (value - low) / (high - low)

    parts = []
    for k in range(5):
        value = low + (high - low) * k / 4
        parts.append(_line(MARGIN, y(value), WIDTH - 12, y(value), "grid"))
        parts.append(_text(MARGIN - 6, y(value) + 4, f"{value:.3g}", "end"))
    for i in range(0, count, -(-count // 16)):
        parts.append(_text(x(i), HEIGHT - 14, str(i)))
    parts.append(_text((MARGIN + WIDTH) / 2, HEIGHT - 1, "layer"))
    for n, (name, values) in enumerate(series.items()):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        parts.append(f'<polyline class="s{n}" points="{points}"/>')
        for i, v in enumerate(values):
            circle = f'circle class="s{n}" cx="{x(i):.1f}" cy="{y(v):.1f}" r="3.5"'
            parts.append(_titled(circle, f"{name}, layer {i}: {v:.4f}"))
    keys = (f'<span><i class="s{n}"></i>{html.escape(s)}</span>' for n, s in enumerate(series))
    return f'<div class="keys">{"".join(keys)}</div>{_svg(WIDTH, HEIGHT, parts, label)}'


def floor_of(series: dict[str, Sequence[float]]) -> float:
    """Where an axis of agreement begins that ends at 1: a tenth at or below all values."""
    least = min(min(values) for values in series.values())
    return min(0.9, int(least * 10 - (least < 0)) / 10)


def loads(layers: Sequence[dict], name: str) -> str:
    """A square for each layer and expert of a model, coloured by its load over an even share."""
    side, experts = 16, len(layers[0]["load"][name])
    parts = [_text(34 + (e + 0.5) * side, 10, str(e)) for e in range(experts)]
    for row, layer in enumerate(layers):
        top = 16 + row * side
        parts.append(_text(28, top + 12, str(layer["layer"]), "end"))
        for e, share in enumerate(layer["load"][name]):
            above = max(-1.0, min(1.0, share * experts - 1))  # 0 when even
            rect = (
                f'rect class="{"over" if above > 0 else "under"}" x="{34 + e * side}" y="{top}" '
                f'width="{side - 1}" height="{side - 1}" fill-opacity="{abs(above):.2f}"'
            )
            parts.append(_titled(rect, f"layer {layer['layer']}, expert {e}: {share:.4f}"))
    size = 34 + experts * side, 16 + len(layers) * side
    return f"<figure><figcaption>{name}</figcaption>{_svg(*size, parts, name)}</figure>"


def histogram(counts: Sequence[int], reach: float, trits: bool, title: str) -> str:
    """The teacher's weights; in units of the student's trits with the thresholds between these."""
    width, height, largest = 190, 84, max(max(counts), 1)
    step = width / len(counts)

    def x(value):
        return width * (value / reach + 1) / 2

    bars = (
        f"M{i * step:.1f} {height - 16}v{-(height - 20) * count / largest:.1f}h{step:.2f}V68z"
        for i, count in enumerate(counts)
    )
    parts = [f'<path class="bars" d="{"".join(bars)}"/>']
    parts += [_line(x(t), 2, x(t), height - 16, "mark") for t in ((-0.5, 0.5) if trits else ())]
    parts += [_text(x(v), height - 3, f"{v:d}") for v in (-3, -2, -1, 0, 1, 2, 3)]
    caption = f"{title}, in {'trits' if trits else 'root mean squares'}"
    caption = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<figure>{caption}{_svg(width, height, parts, title)}</figure>"


# --- The page -------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#667080;--back:#fff;--card:#f5f6f8;--grid:#dde1e7;
--c0:#2563eb;--c1:#dc6803;--c2:#0d9488;--c3:#b4239f}
@media(prefers-color-scheme:dark){:root{--ink:#e7eaf0;--dim:#9aa4b2;--back:#14171c;--card:#1d2129;
--grid:#333a45;--c0:#6ea0ff;--c1:#f79a3e;--c2:#3cc9b9;--c3:#e879d4}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;
max-width:1340px;padding:24px 28px 60px}
h1{font-size:23px;margin:0}h2{font-size:17px;margin:34px 0 2px}p{color:var(--dim);margin:2px 0 10px;
max-width:80ch}code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
.cards,.row{display:flex;flex-wrap:wrap;gap:12px 28px}.cards{gap:12px;margin-top:18px}
.cards div{background:var(--card);border-radius:8px;padding:10px 16px;min-width:150px}
.cards b{display:block;font-size:21px}.cards span{color:var(--dim);font-size:13px}
svg{display:block;max-width:100%;height:auto;font:11px system-ui,sans-serif}
text{fill:var(--dim)}.grid{stroke:var(--grid)}.mark{stroke:var(--c1);stroke-dasharray:4 3}
polyline{fill:none;stroke-width:2}.bars{fill:var(--c0);opacity:.75}rect{stroke:var(--grid)}
.over{fill:var(--c1)}.under{fill:var(--c0)}figure{margin:0}figcaption{font-size:13px;
color:var(--dim)}.keys{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px}
.keys i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}
circle.s0,i.s0{fill:var(--c0);background:var(--c0)}circle.s1,i.s1{fill:var(--c1);
background:var(--c1)}circle.s2,i.s2{fill:var(--c2);background:var(--c2)}
circle.s3,i.s3{fill:var(--c3);background:var(--c3)}
.text{white-space:pre-wrap;font:14px/1.75 ui-monospace,monospace;background:var(--card);
border-radius:8px;padding:14px 18px;max-width:100ch;overflow-wrap:anywhere}
.text span{border-radius:2px}.text span:hover{outline:2px solid var(--c0)}
"""


def page(found: dict) -> str:
    """The comparison as an HTML page."""
    layers, teacher, student = found["layers"], found["teacher"], found["student"]

    def plot(label, **keys):
        named = {
            title.replace("_", " "): [row[key] for row in layers] for title, key in keys.items()
        }
        return lines(named, label, floor_of(named), 1)

    parts = [_summary(found, teacher, student)]

    def section(title, about, *contents):
        parts.append(f"<h2>{title}</h2><p>{about}</p>")
        parts.append(f'<div class="row">{"".join(contents)}</div>')

    section(
        "Hidden states",
        "Cosine of the two models' outputs of each layer, and of what it added to its input: "
        "means over tokens.",
        plot("cosines", output="cosine", what_the_layer_added="delta_cosine"),
    )
    if "load" in layers[0]:
        section(
            "Routing",
            "Share of tokens that both models send to the same experts. Weighted, a token counts "
            "by how sure the teacher is: by the gap between the probabilities of the last expert "
            "that it takes and the next one.",
            plot(
                "agreement of routers",
                first_expert="top1",
                first_expert_weighted="top1_weighted",
                all_experts="set",
                all_experts_weighted="set_weighted",
            ),
        )
        section(
            "Load of experts",
            "Share of the choices: a white square has an even share, a full orange one twice that "
            "or more, a full blue one none.",
            *(loads(layers, name) for name in ("teacher", "student")),
        )
    section(
        "Weights",
        "Squared error of the student's weights over the teacher's own squares.",
        lines(errors := _errors(found), "errors", 0, 1.05 * max(map(max, errors.values())) or 1),
    )
    section(
        "What the weights were",
        "The teacher's weights of each layer. Where the student is ternary, in multiples of what "
        "its trits stand for: between the dashed lines a weight becomes 0. The outer bars hold all "
        "that lies beyond.",
        *(
            histogram(h["counts"], found["reach"], h["trits"], f"{family}, layer {row['layer']}")
            for family in found["families"]
            for row in layers
            for h in [row["histograms"][family]]
        ),
    )
    parts.append(
        f"<h2>The text</h2><p>The first {len(found['sample']):,} tokens, the darker the more the "
        f"predictions of it differ: full at a KL of {SATURATED:g} nats. Under the pointer is what "
        "was predicted there.</p>"
        f'<div class="text">{"".join(map(_token, found["sample"]))}</div>'
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>What the student lost</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _summary(found: dict, teacher: dict, student: dict) -> str:
    pairs = {
        title: f"{teacher[key]:.4f} → {student[key]:.4f}"
        for title, key in (
            ("nats per token", "loss_per_token"),
            ("nats per character", "loss_per_character"),
            ("perplexity per token", "perplexity"),
        )
    }
    cards = {
        "KL(teacher ‖ student), nats per token": f"{found['kl']:.4f}",
        "same likeliest token": f"{100 * found['agreement']:.1f} %",
        **pairs,
        f"tokens, {found['characters']:,} characters": f"{found['tokens']:,}",
    }
    cards = (f"<div><b>{value}</b><span>{title}</span></div>" for title, value in cards.items())
    models = (
        f"{name} <code>{html.escape(one['folder'])}</code> ({html.escape(one['activations'])} "
        "activations)"
        for name, one in (("Student", student), ("teacher", teacher))
    )
    return (
        f"<h1>What the student lost</h1><p>{', '.join(models)}; each on its own hidden states.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _errors(found: dict) -> dict[str, list[float]]:
    return {name: [row["error"][name] for row in found["layers"]] for name in found["families"]}


def _token(one: dict) -> str:
    """A token of the sample, coloured, with what both models expected there."""

    def expected(name):
        predicted = (f"{_shown(piece)} {100 * p:.1f} %" for piece, p in one[name])
        return f"{name}: {', '.join(predicted)}"

    title = (
        f"{_shown(one['text'])}  KL {one['kl']:.3f}\n{expected('teacher')}\n{expected('student')}"
    )
    alpha = max(0.0, min(1.0, one["kl"] / SATURATED))
    text = "⏎\n" if one["text"] == "\n" else one["text"]
    return (
        f'<span style="background:rgba(220,104,3,{alpha:.2f})" title="{html.escape(title)}">'
        f"{html.escape(text)}</span>"
    )


def _shown(piece: str) -> str:
    return f"‘{piece}’".replace("\n", "⏎")
