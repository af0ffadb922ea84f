"""How the parameters of a verb are the options of its command, and the parameters that verbs share.

A verb is a typed function. Its docstring has the help: the summary and the text of the command,
`Args:` of its options, `Examples:` to copy and `Notes:` that end the help. The command's help
leaves out paragraphs on errors, and from "In Python" on what is said of the function alone. A hint
says what is typed, and `Option` what a hint can't say. What several verbs take stands here, once:

    @verb
    def resize(adapter: Adapter, out: Out, *, rank: Annotated[int | None, Option(min=1)] = None,
               **opening: Unpack[Opening]) -> "Resized": ...     a group; so is a dataclass

Nothing here imports what takes long.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from inspect import Parameter
from pathlib import Path
from textwrap import dedent, fill, indent
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    TypeVar,
    get_args,
    get_type_hints,
    is_typeddict,
)

from lorafold.models.quantizations import LISTED

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.recipe.recipe import Recipe

Verb = TypeVar("Verb", bound=Callable[..., Any])
BASE = "Base model"
SECTION = re.compile(r"^(Args|Examples|Notes):\n((?:    .*\n|\n(?=    ))+)", re.MULTILINE)
ARGS = re.compile(r"^Args:\n(?:    .*\n)+", re.MULTILINE)
ENTRY = re.compile(r"^(\w+): (.*\n(?:    .*\n)*)", re.MULTILINE)


@dataclass(frozen=True, repr=False)
class Option:
    """How a command takes a parameter, where the hint, the name and the docstring don't say it.

    help: Of a parameter that verbs share; others have an entry of `Args:`.
    kind: What is typed, where the hint has more or other things: str, Path, list[str].
    flag: The option's name where it is not the parameter's, as in "--weight" of a list of weights.
    rare: Of a command with many options, only `--help-all` has it.
    required: The command asks for it, although the parameter has a default.
    default: That of a parameter of a group.
    typed: False for what only Python takes.
    saved: Of saved adapters, which are given by position or by `--adapter`, how many: one, some or
        any.
    beside: Another option for more of it: its name, and its help.
    """

    help: str = ""
    kind: Any = None
    flag: str = ""
    metavar: str | None = None
    panel: str | None = None
    rare: bool = False
    required: bool = False
    default: Any = None
    min: float | None = None
    max: float | None = None
    typed: bool = True
    saved: Literal["", "one", "some", "any"] = ""
    beside: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return "..."  # of signatures that are shown


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe, of which the command takes fields as options, `--set` and, if so, `--config`.

    names: The fields; None for all but `without`.
    sets: The help of `--set`.
    defaults: The recipe below what is typed, by the arguments of the verb.
    """

    names: Collection[str] | None = None
    without: Collection[str] = ()
    config: bool = True
    sets: str = "One field of the recipe, as in --set rank=8."
    defaults: Callable[[Mapping[str, Any]], "Recipe | None"] = lambda _: None


def of_quickstart(typed: Mapping[str, Any]) -> "Recipe | None":
    """The recipe of the quickstart, for a study of its task; None for one of the user's data."""
    from lorafold.quickstart.story import RECIPE

    return None if typed["data"] else RECIPE


class Docs(NamedTuple):
    """A docstring: its text without the sections and errors, its entries, examples and notes."""

    about: str
    args: dict[str, str]
    examples: tuple[str, ...]
    notes: str

    @classmethod
    def of(cls, documented: Any) -> "Docs":
        """Those of a function or a dataclass."""
        text = f"{inspect.cleandoc(documented.__doc__ or '')}\n"
        parts = {title: dedent(body) for title, body in SECTION.findall(text)}
        told = [part.strip() for part in SECTION.sub("\n", text).split("\n\n")]
        about = "\n\n".join(part for part in told if not part.startswith(("Raises ", "In Python")))
        entries = {n: " ".join(t.split()) for n, t in ENTRY.findall(parts.get("Args", ""))}
        examples = re.split(r"\n(?=\S)", parts.get("Examples", "").strip())
        return cls(about.strip(), entries, (*examples,), parts.get("Notes", "").strip())


class DeclaredOption(NamedTuple):
    """A parameter of a verb or of a group of its parameters.

    group: The name of the parameter that the group is, and its class; None outside of groups.
    """

    name: str
    hint: Any
    default: Any
    option: Option | RecipeOptions
    help: str
    group: tuple[str, type] | None = None


def declared(verb: Any) -> Iterator[DeclaredOption]:
    """The parameters of a verb, with those of groups in the place of the groups."""
    docs = Docs.of(verb)
    for name, parameter in inspect.signature(verb, follow_wrapped=False).parameters.items():
        hint = parameter.annotation
        [group] = get_args(hint) if parameter.kind is Parameter.VAR_KEYWORD else [hint]
        if is_typeddict(group):
            for inner, one in get_type_hints(group, include_extras=True).items():
                option = _option(one)
                yield DeclaredOption(inner, one, option.default, option, option.help)
        elif is_dataclass(group) and isinstance(group, type):
            entries = Docs.of(group).args
            for field in fields(group):
                option, empty = _option(field.type), field.default is MISSING
                default = Parameter.empty if empty else field.default
                text = getattr(option, "help", "") or entries.get(field.name, "")
                yield DeclaredOption(field.name, field.type, default, option, text, (name, group))
        else:
            option = _option(hint)
            text = getattr(option, "help", "") or docs.args.get(name, "")
            yield DeclaredOption(name, hint, parameter.default, option, text)


def _option(hint: Any) -> Any:
    return next(
        (one for one in get_args(hint) if isinstance(one, (Option, RecipeOptions))), Option()
    )


def verb(function: Verb) -> Verb:
    """The function, whose signature and docstring have the parameters of its groups too."""
    of: Any = function
    own, entries, shown = inspect.signature(of), Docs.of(of).args, list[str]()
    given = {p.name: p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD}
    for one in declared(of):
        if one.group is None:
            new = Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default)
            given.setdefault(one.name, new.replace(annotation=one.hint))
            told = f"{one.name}: {entries.get(one.name) or one.help}"
            shown.append(fill(told, 90, subsequent_indent="    "))
    before, *after = ARGS.split(f"{inspect.cleandoc(of.__doc__)}\n", maxsplit=1)
    listed = indent("\n".join(shown), "    ")
    of.__doc__ = f"{before.rstrip()}\n\nArgs:\n{listed}\n{''.join(after)}"
    of.__signature__ = own.replace(parameters=[*given.values()])
    return function


def rows(text: str, weighted: bool = False) -> str:
    """The help of rows.

    Args:
        text: The shapes that a row may have.
        weighted: Whether a source may have a weight.
    """
    share = " FILE:0.3 takes 0.3 of its rows an epoch." if weighted else ""
    return (
        "A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; also .gz, .zst), a directory, a"
        f' pattern such as "data/*.jsonl", or a hub dataset.{share} A row is {text}.'
        " In Python also the rows themselves, as a list of dicts."
    )


Paths = str | Path | Sequence[str | Path]  # one directory or several
Data = str | Path | Sequence[str] | Sequence[dict[str, Any]]  # one source, several, or the rows
Named = Mapping[str, str]  # the user's names of keys, by lorafold's
Rewarding = str | Callable[..., Any] | Sequence[str | Callable[..., Any]]
Tasks = Mapping[str, Data] | Sequence[str | Path]  # rows by the name of a task, or files

KINDS = "smollm2 (embedded), a directory, a .gguf file or a hub id (owner/name)"
_MODEL = Option(
    f"The base: {KINDS}. Default: the adapter's own base, as its record says; without an adapter"
    " smollm2.",
    kind=str,
    panel=BASE,
)
Model = Annotated[str | Path | None, _MODEL]
ModelOrLoaded = Annotated[
    "str | Path | PreTrainedModel | None",
    replace(
        _MODEL,
        help=f"{_MODEL.help} In Python also a loaded model, which is used with its active adapters"
        " and takes no other `storage`, `device`, `revision` or `allow_other_base`.",
    ),
]
OnlyModel = Annotated[str | Path, Option(f"The base: {KINDS}.", kind=str, panel=BASE)]
Tokenizer = Annotated[
    "PreTrainedTokenizerBase | None",
    Option("None takes that of the adapters or the model.", typed=False),
]
Progress = Annotated[
    "Console | None", Option("A rich console for progress and notices; None is quiet.", typed=False)
]
SAVED = "Saved adapters in PEFT's format, stacked on the base in this order."
Adapters = Annotated[Paths, Option(SAVED, saved="any")]
SomeAdapters = Annotated[Paths, Option(SAVED, saved="some")]
Adapter = Annotated[str | Path, Option("A saved adapter in PEFT's format.", saved="one")]
Over = Annotated[
    Paths, Option("The adapter that this one was trained over; of a stack each, the lowest first.")
]
_OUT = Option(
    "The directory of the result. It must be new, and appears once it is complete.", required=True
)
Out = Annotated[str | Path, _OUT]
OutLast = Annotated[str | Path | None, _OUT]  # after parameters that have defaults
StudyOut = Annotated[
    str | Path, Option("The directory of the figures. The same command continues after a stop.")
]
Overwrite = Annotated[
    bool,
    Option("Replace what an earlier run wrote to OUT, once the new result is complete.", rare=True),
]
TrainingRows = Annotated[
    Data,
    Option(
        rows(
            "{messages}, {prompt, completion}, {conversations} (ShareGPT), {instruction, output}"
            " (Alpaca), {text} or {text, label}",
            weighted=True,
        ),
        kind=list[str],
    ),
]
MeasuredRows = Annotated[
    Data | None,
    Option(
        rows(
            "{messages}, {prompt, completion}, {conversations} (ShareGPT), {instruction, output}"
            " (Alpaca), {prompt, chosen, rejected}, {text} or {text, label}; conversations may have"
            " tools"
        ),
        kind=str,
        required=True,
    ),
]
StudyRows = Annotated[
    Data | None,
    Option("Training rows, as for train. Default: the quickstart's task.", kind=list[str]),
]
HeldOut = Annotated[
    Data | None, Option("Held-out rows. Default: `eval_fraction` or a tenth is held out.", kind=str)
]
Columns = Annotated[
    Named | None,
    Option(
        "The columns of your rows that lorafold shall read under its own names, as in"
        " prompt=question,completion=answer; NAME= drops a column."
        ' In Python a mapping such as {"prompt": "question"}; "" drops a column.',
        kind=list[str],
        metavar="NAME=COLUMN",
    ),
]
Length = Annotated[
    int | None,
    Option(
        "Longer rows are cut to this many tokens. Default: 1,024, or as many as the model has"
        " positions.",
        min=2,
    ),
]
Judges = Annotated[
    Rewarding,
    Option(
        "For objectives that draw completions: what judges them, as FILE.py:FUNCTION,"
        " regex:PATTERN, schema:FILE.json, reasoning-gym:TASK or adapter:DIR, with a weight as"
        " in 0.5*... or without; several are added. In Python also functions.",
        kind=list[str],
        flag="--reward",
        default=(),
        beside=(
            "--reward-adapter",
            "The same as --reward adapter:DIR: a reward model that was trained on this base"
            " (--objective reward). It scores with the base of the run, which is in memory once.",
        ),
    ),
]
Completions = Annotated[
    bool, Option("Generate completions for the exact match, or measure only the loss.")
]
Seed = Annotated[
    int,
    Option(
        "The seed of everything that is drawn at random: the same seed, the same result.",
        min=0,
        max=2**32 - 1,
    ),
]
System = Annotated[str | None, Option("A system message. Default: the chat template's.")]
NewTokens = Annotated[int, Option("The most tokens of a completion.", min=1)]
Temperature = Annotated[
    float, Option("0 takes the most likely token; above 0 tokens are sampled.", min=0)
]
ControlTokens = Annotated[bool, Option("Those in messages are tokens, not text.")]
Device = Annotated[
    str | None,
    Option(
        "cpu, cuda, cuda:N or mps. Default: the fastest that this machine has.",
        panel=BASE,
        rare=True,
    ),
]


class Hub(TypedDict, total=False):
    """How a base comes from the hub."""

    revision: Annotated[
        str | None,
        Option(
            "The branch, tag or commit of a hub model. Only a commit never changes.",
            panel=BASE,
            rare=True,
        ),
    ]
    trust_remote_code: Annotated[
        bool,
        Option(
            "Run Python code that comes with the model. It gets all the rights you have.",
            panel=BASE,
            rare=True,
            default=False,
        ),
    ]


class Computing(Hub, total=False):
    """How a base comes, and the device that computes with it."""

    device: Device


class Stacking(Computing, total=False):
    """How a base comes that saved adapters are loaded on."""

    allow_other_base: Annotated[
        bool,
        Option(
            "Accept an adapter although its fingerprint says it was trained on another base.",
            panel=BASE,
            rare=True,
            default=False,
        ),
    ]


class Opening(Stacking, total=False):
    """How a base is opened that saved adapters are loaded on."""

    storage: Annotated[
        str,
        Option(
            f"How the base stores its weights: {LISTED} or auto. auto takes the storage that the"
            " adapter was trained on, else bf16 or fp32, whichever the device is faster with.",
            panel=BASE,
            default="auto",
        ),
    ]


class AsTrained(Stacking, total=False):
    """How a base is found whose adapters are written into files."""

    storage: Annotated[
        str,
        Option(
            f"How the base stored its weights in training: {LISTED} or auto, which takes it from"
            " the adapters' records.",
            panel=BASE,
            default="auto",
        ),
    ]


class OfDirectory(Stacking, total=False):
    """How a base is opened whose adapters lie in a directory."""

    storage: Annotated[
        str,
        Option(
            f"How the base stores its weights: {LISTED} or auto, which takes what most of the"
            " adapters in the directory were trained on.",
            panel=BASE,
            default="auto",
        ),
    ]
