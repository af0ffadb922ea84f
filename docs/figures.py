"""The drawings, equations and charts of the pages. Drawings are SVG in the page's colours: frozen
parts have a thin frame, trained parts a thick one and a tint, so that they differ without colours.

    W + B A         a matrix is a box as tall and as wide as it is, a vector a narrow one
    row -> tokens   a step is a box with words

    python docs/figures.py      writes memory.svg, the README's chart
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path

BIG, THIN, GAP, HEIGHT = 64, 18, 9, 84
LETTER = 8.2  # the width of a letter


@dataclass(frozen=True)
class Box:
    """A matrix or a step: what stands in it, its size, and whether it is trained."""

    label: str
    width: float = BIG
    height: float = BIG
    trained: bool = False
    dots: bool = False  # a matrix of which few entries are not 0

    def draw(self, x: float) -> str:
        kind = "trained" if self.trained else "frozen"
        top, middle = (HEIGHT - self.height) / 2, x + self.width / 2
        frame = (x, top, self.width, self.height)
        parts = [rect(kind, *frame, 3)]
        if self.dots:
            places = ((9, 12), (40, 7), (51, 22), (7, 46), (24, 53), (48, 48))
            parts = [rect("frozen", *frame, 3)]
            parts += [rect("trained", x + a, top + b, 7, 7, 1) for a, b in places]
        parts.append(text(middle, self.label))
        return "".join(parts)


def rect(kind: str, x: float, y: float, width: float, height: float, round: int) -> str:
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect class="{kind}" {size} rx="{round}"/>'


def text(x: float, words: str) -> str:
    return f'<text x="{x:g}" y="{HEIGHT / 2:g}">{html.escape(words)}</text>'


def frozen(label: str, width: float = BIG, height: float = BIG) -> Box:
    return Box(label, width, height)


def trained(label: str, width: float = BIG, height: float = BIG) -> Box:
    return Box(label, width, height, trained=True)


def step(words: str, is_trained: bool = False) -> Box:
    """A step of a way: words in a frame."""
    return Box(words, 20 + LETTER * len(words), 44, is_trained)


W = frozen("W")
B, A = trained("B", THIN, BIG), trained("A", BIG, THIN)
PRODUCT = (W, "+", B, A)

# name: what is drawn from left to right, and the sentence below
FIGURES: dict[str, tuple[tuple[Box | str, ...], str]] = {
    "lora": (PRODUCT, "The weight stays frozen; the product of two small matrices is added."),
    "lora_inits": (
        (frozen("W − B₀A₀", 92), "+", B, A),
        "As LoRA, but B and A start from a part of the weight, which is subtracted.",
    ),
    "dora": (
        (trained("m", THIN), "·", "norm", "(", *PRODUCT, ")"),
        "The direction and the length of each row of the weight are trained separately.",
    ),
    "adalora": (
        (W, "+", trained("P", THIN, BIG), trained("Λ", THIN, THIN), trained("Q", BIG, THIN)),
        "Three factors; training sets the least important entries of Λ to 0.",
    ),
    "vera": (
        (W, "+", trained("b", THIN), "·", frozen("B", 30), trained("d", THIN, 30), "·",
         frozen("A", BIG, 30)),
        "B and A are random and shared by all layers; each layer trains two vectors.",
    ),
    "loha": (
        (W, "+", "(", trained("B₁", 24, BIG), trained("A₁", BIG, 24), ")", "∘",
         "(", trained("B₂", 24, BIG), trained("A₂", BIG, 24), ")"),
        "The elementwise product of two low-rank matrices.",
    ),
    "lokr": (
        (W, "+", trained("C", 30, 30), "⊗", trained("B", THIN, 40), trained("A", 40, THIN)),
        "The Kronecker product of a small matrix and a low-rank product.",
    ),
    "ia3": ((trained("g", THIN), "·", W), "Each output is multiplied by a trained parameter."),
    "bitfit": ((W, "x", "+", trained("b", THIN)), "Only the biases are trained."),
    "full": ((trained("W"),), "Every weight is trained."),
    "sparse": (
        (W, "+", Box("", dots=True)),
        "A few entries of the weight are chosen, and only these are trained.",
    ),
    "bottleneck": (
        (step("layer"), "→", trained("down", 52, 26), "→", "f", "→", trained("up", 52, 26), "→"),
        "A small network of two matrices follows the layer, and its output is added.",
    ),
    "prompt_tuning": (
        (trained("P", 24, 30), trained("P", 24, 30), trained("P", 24, 30),
         *(frozen(w, 24, 30) for w in "xyz"), "→", step("model")),
        "Trained embeddings precede the tokens of the text.",
    ),
    "prefix_tuning": (
        (step("attention"), "over", trained("P", 24, 30), trained("P", 24, 30),
         *(frozen(w, 24, 30) for w in "xyz")),
        "Each attention layer reads trained keys and values in front of its own.",
    ),
    "linear_probe": (
        (step("model"), "→", trained("head", 56, 40), "→", "class"),
        "The model stays frozen; a head for the classes is trained on top of it.",
    ),
    "fastfood": (
        (W, "+", frozen("P", 52, BIG), trained("θ", THIN, 52)),
        "One short vector is trained; a fixed projection expands it to a full update.",
    ),
    "concepts": (
        (step("base: frozen"), "+", step("adapter: trained", True), "→", step("merged: one model")),
        "Only the adapter is trained. Merged or not, the outputs are the same.",
    ),
    "row": (
        (step("row"), "→", step("conversation"), "→", step("template"), "→", step("tokens"), "→",
         step("loss of the answer", True)),
        "The loss counts the tokens that a preview shows between ⟦ and ⟧.",
    ),
    "law": (
        (step("unmerged: Wx + BAx"), "=", step("merged: (W + BA)x")),
        "A merged model gives the same output as base + adapter.",
    ),
    "serving": (
        (step("requests"), "→", step("one base, one batch"), "+",
         step("adapter of each request", True), "→", step("answers")),
        "Requests for different adapters share one base and each forward pass.",
    ),
}  # fmt: skip

# name: the equation of a method as TeX, and its symbols in Markdown; sizes are rows times columns
EQUATIONS: dict[str, tuple[str, str]] = {
    "lora": (
        r"y = W x + s\,B A\,\text{drop}(x), \qquad s = \frac{\alpha}{r}",
        r"$A$ ($r \times \text{in}$) starts random and $B$ ($\text{out} \times r$) at zero. "
        r"rsLoRA divides by the root of the rank: $s = \alpha / \sqrt{r}$.",
    ),
    "lora_inits": (
        r"\begin{align*} y &= W x + s\,(B A - B_0 A_0)\,\text{drop}(x) \\"
        r" s\,(B A - B_0 A_0) &= s \begin{bmatrix} B - B_0 & B_0 \end{bmatrix}"
        r" \begin{bmatrix} A \\ A - A_0 \end{bmatrix} \end{align*}",
        r"$A$ ($r \times \text{in}$) and $B$ ($\text{out} \times r$) start at $A_0$ and $B_0$. "
        r"The second form has rank $2r$; both differences are computed in fp32.",
    ),
    "dora": (
        r"y = g \odot (V x) + b, \qquad V = W + \Delta W, \qquad g = \frac{m}{\lVert V \rVert}",
        r"$m$ ($\text{out}$) starts at $\lVert W \rVert$. The norm of each row is taken as a "
        r"constant in the backward pass.",
    ),
    "adalora": (
        r"\begin{align*} y &= W x + s\,P\,\text{diag}(E)\,Q\,\text{drop}(x) \\"
        r" \text{penalty} &= \gamma\,\text{mean}\left({\lVert P^\top P - I \rVert}_F,\;"
        r" {\lVert Q Q^\top - I \rVert}_F\right) \end{align*}",
        r"$P$ ($\text{out} \times r$), $E$ ($r$) zero at start, $Q$ ($r \times \text{in}$); "
        r"$s = \alpha / (r + 10^{-5})$ with the rank at the start. $\gamma$ is the option "
        r"`orth_reg`, and the mean is over all matrices of the adapter.",
    ),
    "vera": (
        r"y = W x + \text{diag}(b)\,B\,\text{diag}(d)\,A\,\text{drop}(x)",
        r"$A$ and $B$ are frozen; each layer uses their first $\text{in}$ columns and "
        r"$\text{out}$ rows. $b$ ($\text{out}$) starts at 0 and $d$ ($r$) at 0.1.",
    ),
    "loha": (
        r"\Delta W = \frac{\alpha}{r}\,(A_1 B_1) \odot (A_2 B_2) = U V",
        r"$A_i$ ($\text{out} \times r$), $B_i$ ($r \times \text{in}$), $B_2$ zero at start. The "
        r"columns of $U$ ($\text{out} \times r^2$) are products of a column of $A_1$ and one of "
        r"$A_2$, the rows of $V$ ($r^2 \times \text{in}$) of a row of $B_1$ and one of $B_2$.",
    ),
    "lokr": (
        r"\Delta W = \frac{\alpha}{r}\,C \otimes D, \qquad (C \otimes D)\,x = D X C^\top",
        r"$C$ ($o_1 \times i_1$) is zero at start, $D$ ($o_2 \times i_2$); "
        r"$o_1 o_2 = \text{out}$ and $i_1 i_2 = \text{in}$. $X$ ($i_2 \times i_1$) is $x$, "
        r"reshaped.",
    ),
    "ia3": (
        r"y = l \odot (W x + b) \qquad \text{or} \qquad y = W (l \odot x) + b",
        r"The first form is for keys and values, the second for the last matrix of the MLP. $l$ "
        r"starts at 1.",
    ),
    "bitfit": (r"y = \text{layer}(x) + c", r"$c$ ($\text{out}$) is zero at start."),
    "full": (
        r"y = W x + b",
        r"$W$ itself is the parameter; there is no copy, and nothing to merge.",
    ),
    "sparse": (
        r"W'_p = W_p + v_p \quad (p \in S), \qquad {\lvert S \rvert} = \rho\,{\lvert W \rvert}",
        r"$S$ are the chosen positions, in all matrices together, and $\rho$ is the option "
        r"`density`. The values $v$ start at 0.",
    ),
    "bottleneck": (
        r"y = z + U f(D z + d) + u, \qquad z = \text{sublayer}(x)",
        r"$D$ ($m \times d$), $U$ ($d \times m$) zero at start; $f$ is GELU or ReLU.",
    ),
    "prompt_tuning": (
        r"\text{model}([E,\ \text{embed}(\text{ids})])",
        r"$E$ ($n \times d$) holds the trained embeddings.",
    ),
    "prefix_tuning": (
        r"\text{attention}(q,\ [P_K, K],\ [P_V, V])",
        r"$P$ has $n$ keys and $n$ values for each head of keys and values of every layer.",
    ),
    "linear_probe": (
        r"\text{logits} = W h + b",
        r"$W$ ($\text{classes} \times d$) and $b$ start as the model's own head; $h$ is never "
        r"changed.",
    ),
    "fastfood": (
        r"\Delta W_i = \frac{l_i}{\sqrt{d}}\,P_i v, \qquad P_i v = H G_i Q H B v",
        r"$v$ ($d$) is zero at start and shared by all matrices; each matrix has a scale $l_i$, "
        r"one at start. $B$ holds random signs, $Q$ is a random permutation, $G_i$ holds Gaussian "
        r"numbers, $H$ is the Walsh-Hadamard matrix, and $v$ is padded to $2^k$ entries.",
    ),
}


def figure(name: str) -> str:
    """A drawing as HTML: one block of Markdown, without blank lines."""
    things, caption = FIGURES[name]
    x, parts = 2.0, list[str]()
    for thing in things:
        if isinstance(thing, Box):
            parts.append(thing.draw(x))
            x += thing.width + GAP
        else:
            width = LETTER * len(thing) + 4
            parts.append(text(x + width / 2, thing))
            x += width + GAP
    width = x - GAP + 2
    size = f'viewBox="0 0 {width:g} {HEIGHT}" width="{width:g}" height="{HEIGHT}"'
    words = html.escape(caption)
    return (
        f'<figure class="drawing"><div><svg {size} role="img" aria-label="{words}">'
        f"{''.join(parts)}</svg></div><figcaption>{words}</figcaption></figure>"
    )


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LEFT, ROOM, BAR, GROUP = 19, 60, 13, 44  # percent before the bars and for them; pixels of height
# in a page the colours are the page's; a file of its own takes the reader's
STYLE = """<style>text { font: 13px system-ui, sans-serif; fill: #1d2327 } .end { text-anchor: end }
.ours { fill: #0f6b64 } .theirs { fill: #b9bfc6 } @media (prefers-color-scheme: dark) {
text { fill: #dfe3e8 } .ours { fill: #6fcabf } .theirs { fill: #5b636d } }</style>"""


def chart() -> str:
    """Peak memory by the length of a row, lorafold and PEFT: bars whose widths are shares of the
    page's, beside letters of one size.
    """
    [run] = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    [table] = run["tables"]
    ours, theirs = map(table["columns"].index, ("peak GB", "PEFT's peak"))
    rows = [row for row in table["rows"] if row[0].startswith("1 ")]
    most = max(float(row[theirs]) for row in rows)
    parts = [f'<text class="end" x="{LEFT - 2}%" y="12">tokens</text>']
    parts += [f'<text x="{LEFT}%" y="12">peak memory</text>']
    for line, row in enumerate(rows):
        top = 24 + line * GROUP
        tokens = f"{int(row[0].split()[-1]):,}"
        parts.append(f'<text class="end" x="{LEFT - 2}%" y="{top + BAR + 5}">{tokens}</text>')
        for place, (kind, column) in enumerate({"ours": ours, "theirs": theirs}.items()):
            y, width = top + place * (BAR + 2), float(row[column]) / most * ROOM
            name = {"ours": " lorafold", "theirs": " PEFT"}[kind] if line == 0 else ""
            label = f'x="{LEFT + width + 1.5:.1f}%" y="{y + BAR - 2}"'
            parts.append(
                f'<rect class="{kind}" x="{LEFT}%" y="{y}" width="{width:.1f}%" height="{BAR}"/>'
                f"<text {label}>{row[column]} GB{name}</text>"
            )
    words = "; ".join(f"{r[0].split()[-1]} tokens: {r[ours]} and {r[theirs]} GB" for r in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="{20 + len(rows) * GROUP}" '
        f'role="img" aria-label="Peak memory, lorafold and PEFT. {words}">{"".join(parts)}</svg>'
    )


def memory() -> str:
    """The chart of the front page, as HTML in one line."""
    return f'<div class="chart">{chart()}</div>'


def file() -> str:
    """The chart as a file, for pages that are not built here."""
    return chart().replace('width="100%"', 'width="640"', 1).replace("><", f">{STYLE}<", 1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("memory.svg").write_text(file(), encoding="utf-8")
