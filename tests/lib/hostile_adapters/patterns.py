"""Patterns: regular expressions, names of modules, and how many there are of them."""

from __future__ import annotations

from hostile_adapters.case import SLOW, cases, config

cases("pattern", {
    "targets": (
        "A regular expression of target modules that takes exponential time.",
        lambda at: config(at, target_modules=SLOW),
    ),
    "excluded": ("The same, of modules to leave out.", lambda at: config(at, exclude_modules=SLOW)),
    "layers": (
        "The same, of layers.",
        lambda at: config(at, layers_pattern=SLOW, layers_to_transform=[0]),
    ),
    "ranks": ("The same, of ranks.", lambda at: config(at, rank_pattern={SLOW: 2})),
    "alphas": ("The same, of alphas.", lambda at: config(at, alpha_pattern={SLOW: 2})),
    "saved": ("The same, of modules to save.", lambda at: config(at, modules_to_save=[SLOW])),
    "many": (
        "Hundreds of thousands of patterns of ranks.",
        lambda at: config(at, rank_pattern={f"no{i}": 2 for i in range(300_000)}),
    ),
    "huge": (
        "A pattern of megabytes, which takes seconds to compile.",
        lambda at: config(at, target_modules="|".join(f"(a{i}?b*)" for i in range(300_000))),
    ),
    "counts": (
        "Counts of counts, whose automaton has billions of states.",
        lambda at: config(at, target_modules="((((a{1,500}){1,500}){1,500}){1,500})b"),
    ),
    "nested": (
        "Groups nested 5,000 deep.",
        lambda at: config(at, target_modules="(" * 5000 + "a" + ")" * 5000),
    ),
})  # fmt: skip
cases("pattern", {
    "just-slow": (
        "One that takes about a second to match all modules, in the server too.",
        lambda at: config(
            at, exclude_modules="(([a-z._0-9])+){1,2}(([a-z._0-9])+){1,2}(([a-z._0-9])+)X"
        ),
    ),
    "some": (
        "As many patterns as pass a limit, each of them tried on each module.",
        lambda at: config(at, alpha_pattern={f"no{i}": 2 for i in range(20_000)}),
    ),
}, told=False)  # fmt: skip
cases("targets", {
    "million": (
        "Hundreds of thousands of names of target modules.",
        lambda at: config(at, target_modules=["q_proj", *(f"no{i}" for i in range(400_000))]),
    ),
}, told=False)  # fmt: skip
cases("targets", {
    "long": (
        "The name of a target module of 4 MB, to which similar ones are looked for.",
        lambda at: config(at, target_modules=["x" * (4 << 20)]),
    ),
})  # fmt: skip
cases("saved", {
    "many": (
        "Hundreds of thousands of modules to save.",
        lambda at: config(at, modules_to_save=[f"no{i}" for i in range(400_000)]),
    ),
})  # fmt: skip
