"""The drawings of the pages, as SVG that takes the page's colours: what is frozen has a thin frame,
what is trained a thick one and a tint, so that they differ without colours too.

    W + B A         a matrix is a box as tall and as wide as it is, a vector a narrow one
    row -> tokens   a step is a box with words
"""

from __future__ import annotations

import html
from dataclasses import dataclass

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
    "lora": (PRODUCT, "The weight stays; the product of two small matrices is added."),
    "lora_inits": (
        (frozen("W − B₀A₀", 92), "+", B, A),
        "As LoRA, but B and A start as a part of the weight, which is taken out of it.",
    ),
    "dora": (
        (trained("m", THIN), "·", "norm", "(", *PRODUCT, ")"),
        "Direction and length of each row of the weight are trained apart.",
    ),
    "adalora": (
        (W, "+", trained("P", THIN, BIG), trained("Λ", THIN, THIN), trained("Q", BIG, THIN)),
        "Three factors; entries of Λ that matter least are set to 0 while it trains.",
    ),
    "vera": (
        (W, "+", trained("b", THIN), "·", frozen("B", 30), trained("d", THIN, 30), "·",
         frozen("A", BIG, 30)),
        "B and A are random and shared by all layers; two vectors a layer are trained.",
    ),
    "loha": (
        (W, "+", "(", trained("B₁", 24, BIG), trained("A₁", BIG, 24), ")", "∘",
         "(", trained("B₂", 24, BIG), trained("A₂", BIG, 24), ")"),
        "Two products, multiplied entry by entry.",
    ),
    "lokr": (
        (W, "+", trained("C", 30, 30), "⊗", trained("B", THIN, 40), trained("A", 40, THIN)),
        "A small matrix, each entry of which is multiplied by a small product.",
    ),
    "ia3": ((trained("g", THIN), "·", W), "Each output is multiplied by one trained number."),
    "bitfit": ((W, "x", "+", trained("b", THIN)), "The biases alone are trained."),
    "full": ((trained("W"),), "Every weight is trained."),
    "sparse": (
        (W, "+", Box("", dots=True)),
        "A few entries of the weight are trained, chosen before.",
    ),
    "bottleneck": (
        (step("layer"), "→", trained("down", 52, 26), "→", "f", "→", trained("up", 52, 26), "→"),
        "A small network of two matrices stands behind the layer, and its output is added.",
    ),
    "prompt": (
        (trained("P", 24, 30), trained("P", 24, 30), trained("P", 24, 30),
         *(frozen(w, 24, 30) for w in "xyz"), "→", step("model")),
        "Trained vectors stand before the tokens of the text.",
    ),
    "prefix": (
        (step("attention"), "over", trained("P", 24, 30), trained("P", 24, 30),
         *(frozen(w, 24, 30) for w in "xyz")),
        "Each attention reads trained keys and values before those of the text.",
    ),
    "linear_probe": (
        (step("model"), "→", trained("head", 56, 40), "→", "class"),
        "The model stays as it is; a head for the classes is trained over it.",
    ),
    "fastfood": (
        (W, "+", frozen("P", 52, BIG), trained("θ", THIN, 52)),
        "One short vector is trained; a fixed projection makes a whole update of it.",
    ),
    "concepts": (
        (step("base: frozen"), "+", step("adapter: trained", True), "→", step("merged: one model")),
        "Training changes the adapter alone. Used as it is, or merged: the outputs are the same.",
    ),
    "row": (
        (step("row"), "→", step("conversation"), "→", step("template"), "→", step("tokens"), "→",
         step("loss of the answer", True)),
        "The life of a row. A preview shows what the last box counts between ⟦ and ⟧.",
    ),
    "law": (
        (step("adapter called: Wx + BAx"), "=", step("folded: (W + BA)x")),
        "The law: folding, then calling, gives what calling gives.",
    ),
    "serving": (
        (step("requests of many"), "→", step("one base, one pass"), "+",
         step("adapter of each request", True), "→", step("answers")),
        "Requests under different adapters are computed together over one base.",
    ),
}  # fmt: skip


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
