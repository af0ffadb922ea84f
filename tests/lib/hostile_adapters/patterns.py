"""Patterns: regular expressions, names of modules, and how many there are of them."""

from __future__ import annotations

from pathlib import Path

from hostile_adapters.case import SLOW, config, either, wrong


@wrong
def pattern_targets(at: Path) -> None:
    """A regular expression of target modules that takes exponential time."""
    config(at, target_modules=SLOW)


@wrong
def pattern_excluded(at: Path) -> None:
    """The same, of modules to leave out."""
    config(at, exclude_modules=SLOW)


@wrong
def pattern_layers(at: Path) -> None:
    """The same, of layers."""
    config(at, layers_pattern=SLOW, layers_to_transform=[0])


@wrong
def pattern_ranks(at: Path) -> None:
    """The same, of ranks."""
    config(at, rank_pattern={SLOW: 2})


@wrong
def pattern_alphas(at: Path) -> None:
    """The same, of alphas."""
    config(at, alpha_pattern={SLOW: 2})


@wrong
def pattern_saved(at: Path) -> None:
    """The same, of modules to save."""
    config(at, modules_to_save=[SLOW])


@either
def pattern_just_slow(at: Path) -> None:
    """One that takes about a second to match all modules, in the server too."""
    config(at, exclude_modules="(([a-z._0-9])+){1,2}(([a-z._0-9])+){1,2}(([a-z._0-9])+)X")


@wrong
def pattern_many(at: Path) -> None:
    """Hundreds of thousands of patterns of ranks."""
    config(at, rank_pattern={f"no{i}": 2 for i in range(300_000)})


@either
def pattern_some(at: Path) -> None:
    """As many patterns as pass a limit, each of them tried on each module."""
    config(at, alpha_pattern={f"no{i}": 2 for i in range(20_000)})


@wrong
def pattern_huge(at: Path) -> None:
    """A pattern of megabytes, which takes seconds to compile."""
    config(at, target_modules="|".join(f"(a{i}?b*)" for i in range(300_000)))


@wrong
def pattern_counts(at: Path) -> None:
    """Counts of counts, whose automaton has billions of states."""
    config(at, target_modules="((((a{1,500}){1,500}){1,500}){1,500})b")


@wrong
def pattern_nested(at: Path) -> None:
    """Groups nested 5,000 deep."""
    config(at, target_modules="(" * 5000 + "a" + ")" * 5000)


@either
def targets_million(at: Path) -> None:
    """Hundreds of thousands of names of target modules."""
    config(at, target_modules=["q_proj", *(f"no{i}" for i in range(400_000))])


@wrong
def targets_long(at: Path) -> None:
    """The name of a target module of 4 MB, to which similar ones are looked for."""
    config(at, target_modules=["x" * (4 << 20)])


@wrong
def saved_many(at: Path) -> None:
    """Hundreds of thousands of modules to save."""
    config(at, modules_to_save=[f"no{i}" for i in range(400_000)])
