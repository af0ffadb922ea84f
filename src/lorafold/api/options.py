"""Declarations of the public functions' parameters, from which the command line is built, and the
parameters that several functions share.

A command's help comes from its function's docstring: the summary, `Args:`, `Examples:` and
`Notes:`. Paragraphs that begin with "Raises" or "In Python" are not part of the help. `Option`
adds details that a type hint can't express:

    @verb
    def resize(adapter: Adapter, out: Out, *, rank: Annotated[int | None, Option(min=1)] = None,
               **base_options: Unpack[BaseOptions]) -> "Resized": ...

Parameters can be grouped in a typed dictionary, as `BaseOptions` here, or in a dataclass.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter
from numbers import Integral, Real
from pathlib import Path
from textwrap import dedent, fill, indent
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from lorafold.errors import LorafoldError
from lorafold.files.record import ALIASES, current_names
from lorafold.foreign_options import unknown_names
from lorafold.models.quantizations import STORAGE_NAMES

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Verb = TypeVar("Verb", bound=Callable[..., Any])
BASE = "Base model"
SECTION = re.compile(r"^(Args|Examples|Notes):\n((?:    .*\n|\n(?=    ))+)", re.MULTILINE)
ARGS = re.compile(r"^Args:\n(?:    .*\n)+", re.MULTILINE)
ENTRY = re.compile(r"^(\w+): (.*\n(?:    .*\n)*)", re.MULTILINE)
PLAIN = {
    bool: (bool, "True or False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "text"),
    NoneType: (NoneType, "None"),
}


@dataclass(frozen=True, repr=False)
class Option:
    """Command-line details of a parameter that its type hint, name and docstring do not contain.

    help: The help text of a shared parameter; `Args:` describes the other parameters.
    kind: The type on the command line (str, Path, list[str]), if the type hint allows several.
    flag: The option's name if it is not the parameter's name, as in --weight for `weights`.
    rare: If the command has many options, only `--help-all` shows this one.
    required: The command requires the option although the parameter has a default.
    default: The parameter's default, for a parameter in a typed dictionary.
    python_only: The command has no such option.
    saved: The number of saved adapters, which are given by position or with `--adapter`.
    second_flag: The name and help of a second option for the same parameter.
    choices: The values that shell completion offers.
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
    python_only: bool = False
    saved: Literal["", "one", "some", "any"] = ""
    second_flag: tuple[str, str] | None = None
    choices: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "..."  # keeps the signatures in `help()` short


@dataclass(frozen=True)
class RecipeOptions:
    """Command-line details of a recipe parameter: `--set`, `--config` and an option per field.

    names: The fields that have an option; None means all fields except `without`.
    config: Whether the command has `--config`.
    sets: The help text of `--set`.
    default: The default recipe, as MODULE:NAME; empty means `lf.Recipe()`.
    """

    names: Collection[str] | None = None
    without: Collection[str] = ()
    config: bool = True
    sets: str = "A field of the recipe, for example --set rank=8."
    default: str = ""


QUICKSTART = "lorafold.quickstart.run:RECIPE"  # the default without `data`


class Docs(NamedTuple):
    """The sections of a docstring that a command's help uses."""

    about: str
    args: dict[str, str]
    examples: tuple[str, ...]
    notes: str

    @classmethod
    def of(cls, documented: Any) -> "Docs":
        text = f"{inspect.cleandoc(inspect.unwrap(documented).__doc__ or '')}\n"
        sections = {title: dedent(body) for title, body in SECTION.findall(text)}
        paragraphs = SECTION.sub("\n", text).strip().split("\n\n")
        summary = (part for part in paragraphs if not part.startswith(("Raises ", "In Python")))
        entries = {n: " ".join(t.split()) for n, t in ENTRY.findall(sections.get("Args", ""))}
        examples = re.split(r"\n(?=\S)", sections.get("Examples", "").strip())
        return cls(
            "\n\n".join(summary).strip(), entries, (*examples,), sections.get("Notes", "").strip()
        )


class DeclaredOption(NamedTuple):
    """A parameter of a function, or a member of a group of parameters. For a field of a dataclass,
    `group` is the name and the class of the function's parameter.
    """

    name: str
    hint: Any
    default: Any
    option: Any  # Option or RecipeOptions
    help: str
    group: tuple[str, type] | None = None


def declared_options(verb: Any) -> Iterator[DeclaredOption]:
    """Yields a function's parameters, with the members of a group in place of the group."""
    entries = Docs.of(verb).args
    for name, parameter in inspect.signature(verb, follow_wrapped=False).parameters.items():
        hint, default = parameter.annotation, parameter.default
        [group] = get_args(hint) if parameter.kind is Parameter.VAR_KEYWORD else [hint]
        if is_typeddict(group):
            for inner, one in get_type_hints(group, include_extras=True).items():
                yield _declaration(inner, one, _option(one).default, {})
        elif is_dataclass(group) and isinstance(group, type):
            group_entries = Docs.of(group).args
            for field in fields(group):
                default_of_field = Parameter.empty if field.default is MISSING else field.default
                one = _declaration(field.name, field.type, default_of_field, group_entries)
                yield one._replace(group=(name, group))
        else:
            yield _declaration(name, hint, default, entries)


def _declaration(name: str, hint: Any, default: Any, entries: Mapping[str, str]) -> DeclaredOption:
    option = _option(hint)
    text = getattr(option, "help", "") or entries.get(name, "")
    return DeclaredOption(name, hint, default, option, text)


def _option(hint: Any) -> Any:
    return next((x for x in get_args(hint) if isinstance(x, Option | RecipeOptions)), Option())


def validated(function: Verb) -> Verb:
    """Makes a function reject unknown arguments and values out of range, as its command does, and
    accept `quantization` as another name for `storage`.
    """
    signature, options = inspect.signature(function), [*declared_options(function)]
    known = signature.parameters.keys()

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs = current_names(kwargs, ALIASES) if "storage" in known else kwargs
        if not kwargs.keys() <= known:
            raise unknown_names(f"lf.{function.__name__}", kwargs, known)
        values = signature.bind_partial(*args, **kwargs).arguments
        for name, hint, _, option, _, group in options:
            value = values.get(name) if group is None else getattr(values.get(group[0]), name, None)
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            hint = hint.__origin__ if get_origin(hint) is Annotated else hint
            members = get_args(hint) if get_origin(hint) is UnionType else [hint]
            kinds = [PLAIN.get(member, (object, "")) for member in members]
            if name in values and not isinstance(value, tuple(kind for kind, _ in kinds)):
                expected = " or ".join(text for _, text in kinds)
                raise LorafoldError(f"{name}: found {value!r:.80}, expected {expected}")
            if choices and value is not None and value not in choices:
                raise LorafoldError(
                    f"{name}: found {value!r}, expected one of {', '.join(choices)}"
                )
            if isinstance(option, Option) and isinstance(value, int | float):
                low, high = option.min, option.max
                if (low is not None and value < low) or (high is not None and value > high):
                    limits = f"{low:g} or more" if high is None else f"{low:g} to {high:.10g}"
                    raise LorafoldError(f"{name}: found {value}, expected {limits}")
        return function(*args, **kwargs)

    result: Any = call
    result.__signature__ = signature
    return result


def verb(function: Verb) -> Verb:
    """Decorates a public function: its signature and docstring list the members of its typed
    dictionaries, and its arguments are validated.
    """
    documented: Any = function
    signature, entries, lines = inspect.signature(documented), Docs.of(documented).args, {}
    parameters_given = signature.parameters.values()
    parameters = {p.name: p for p in parameters_given if p.kind is not Parameter.VAR_KEYWORD}
    for one in declared_options(documented):
        if one.group is None:
            new = Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default)
            parameters.setdefault(one.name, new.replace(annotation=one.hint))
        name = one.group[0] if one.group else one.name
        lines[name] = fill(f"{name}: {entries.get(name) or one.help}", 90, subsequent_indent="    ")
    summary, *rest = ARGS.split(f"{inspect.cleandoc(documented.__doc__)}\n", maxsplit=1)
    listed = indent("\n".join(lines.values()), "    ")
    documented.__doc__ = f"{summary.rstrip()}\n\nArgs:\n{listed}\n{''.join(rest)}"
    documented.__signature__ = signature.replace(parameters=[*parameters.values()])
    result = validated(function)  # its help has no command lines
    result.__doc__ = re.sub(r"^Examples:\n(    .*\n)+\n?", "", documented.__doc__, flags=re.M)
    return result


def rows(text: str, weighted: bool = False) -> str:
    """Returns the help text of a parameter for rows with the formats in `text`."""
    share = " FILE:0.3 uses 30% of its rows in each epoch." if weighted else ""
    return (
        "A file (.jsonl, .json, .csv, .xlsx, .parquet, .arrow, .zip, ...), a directory, a"
        f' pattern such as "data/*.jsonl", or a Hub dataset.{share} Each row is {text}.'
        " In Python, also the rows themselves: dicts in a list or generator, a DataFrame, an Arrow"
        " table, a dict of lists, or a Dataset, IterableDataset or DatasetDict (its train split)."
    )


Paths = str | Path | Sequence[str | Path]  # one directory or several
# one source, several, or rows; an Arrow table is Sized, but not Iterable
Data = str | Path | Iterable[Any] | Sized
ColumnNames = Mapping[str, str]  # lorafold's name of a column -> your name
RewardSource = str | Callable[..., Any] | tuple[Any, Any]  # a weight and one of them
RewardSources = RewardSource | Sequence[RewardSource]
Tasks = Mapping[str, Data] | Sequence[str | Path]  # name of a task -> its rows, or files

Count = Annotated[int, Option(min=1)]
OptionalCount = Annotated[int | None, Option(min=1)]
OptionalLength = Annotated[int | None, Option(min=2)]
OptionalRows = Annotated[Data | None, Option(kind=str)]
KINDS = "smollm2 (embedded), a directory, a .gguf file or a Hub ID (owner/name)"
_MODEL = Option(
    f"The base model: {KINDS}. Default: the adapter's own base model, from its record; smollm2 if"
    " there is no adapter.",
    kind=str,
    panel=BASE,
)
Model = Annotated[str | Path | None, _MODEL]
ModelOrLoaded = Annotated[
    "str | Path | PreTrainedModel | None",
    replace(
        _MODEL,
        help=f"{_MODEL.help} In Python, also a loaded model, which is used with its active adapters"
        " and excludes `storage`, `device`, `revision` and `allow_other_base`.",
    ),
]
OnlyModel = Annotated[str | Path, Option(f"The base model: {KINDS}.", kind=str, panel=BASE)]
Tokenizer = Annotated[
    "PreTrainedTokenizerBase | None",
    Option("None uses the tokenizer of the adapters or of the model.", python_only=True),
]
Progress = Annotated[
    "Console | None",
    Option("A rich console for progress and messages; None prints nothing.", python_only=True),
]
SAVED = "Saved adapters in PEFT format, stacked on the base model in this order."
Adapters = Annotated[Paths, Option(SAVED, saved="any")]
SomeAdapters = Annotated[Paths, Option(SAVED, saved="some")]
Adapter = Annotated[str | Path, Option("A saved adapter in PEFT format.", saved="one")]
Over = Annotated[
    Paths,
    Option(
        "The base adapter that this adapter was trained on top of. For an adapter stack, repeat the"
        " option, with the bottom adapter first."
    ),
]
_OUT = Option(
    "The output directory. It must not exist yet, and appears only when the result is complete.",
    required=True,
)
Out = Annotated[str | Path, _OUT]
OutLast = Annotated[str | Path | None, _OUT]  # after an optional parameter
StudyOut = Annotated[
    str | Path, Option("The directory for the results. To resume, run the same command again.")
]
Overwrite = Annotated[
    bool, Option("Replace an earlier result in OUT once the new one is complete.", rare=True)
]
TrainingRows = Annotated[
    Data,
    Option(
        rows(
            "{messages}, {prompt, completion}, {conversations} (ShareGPT), {instruction, output}"
            " (Alpaca), {text} or {text, label}; for preferences, {prompt, chosen, rejected} or"
            " {prompt, completion, label}; for policies, {prompt}",
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
            " (Alpaca), {prompt, chosen, rejected}, {text} or {text, label}; conversations may"
            " include tools"
        ),
        kind=str,
        required=True,
    ),
]
StudyRows = Annotated[
    Data | None,
    Option("Training rows, as for train. Default: the quickstart task.", kind=list[str]),
]
HeldOut = Annotated[
    Data | None,
    Option(
        "Held-out rows. Default: a share of the training rows, `eval_fraction` or a tenth.",
        kind=str,
    ),
]
Length = Annotated[
    int | None,
    Option(
        "Truncate rows to this many tokens. Default: 1,024, or the model's maximum if it is"
        " smaller.",
        min=2,
    ),
]
Rewards = Annotated[
    RewardSources,
    Option(
        "For objectives that sample completions, a reward: FILE.py:FUNCTION, regex:PATTERN,"
        " schema:FILE.json, judge:FILE.yaml, reasoning-gym:TASK or adapter:DIR, optionally with a"
        " weight, as in 0.5*adapter:DIR. Several rewards are added up. In Python, also functions.",
        kind=list[str],
        flag="--reward",
        rare=True,
        default=(),
        second_flag=(
            "--reward-adapter",
            "The same as --reward adapter:DIR: a reward model trained on this base model"
            " (--objective reward). It shares the run's base model, so that it takes little"
            " memory.",
        ),
    ),
]
Environment = Annotated[
    Any,
    Option(
        "An environment: FILE.py:NAME, or in Python a class, a function, or functions as tools.",
        kind=str, rare=True,
        second_flag=("--tools", "A Python file with functions that the model may call."),
    ),
]
Completions = Annotated[
    bool, Option("Generate completions to measure exact match; otherwise, measure only the loss.")
]
Seed = Annotated[
    int, Option("The random seed. The same seed gives the same result.", min=0, max=2**32 - 1)
]
System = Annotated[str | None, Option("The system message. Default: the chat template's.")]
NewTokens = Annotated[int, Option("The maximum number of tokens to generate.", min=1)]
Temperature = Annotated[
    float, Option("The sampling temperature. 0 always chooses the most likely token.", min=0)
]
ControlTokens = Annotated[
    bool, Option("Read control tokens inside messages as tokens instead of plain text.")
]
Device = Annotated[
    str | None,
    Option(
        "cpu, cuda, cuda:N or mps. Default: the fastest device available.", panel=BASE, rare=True
    ),
]


class DataOptions(TypedDict, total=False):
    """How rows are read; `as_reading` takes these options."""

    columns: Annotated[
        ColumnNames | None,
        Option(
            "Read columns of your rows under lorafold's names, for example"
            " prompt=question,completion=answer. NAME= ignores a column."
            ' In Python, a mapping such as {"prompt": "question"}; "" ignores a column.',
            kind=list[str],
            metavar="NAME=COLUMN",
            rare=True,
        ),
    ]
    me: Annotated[
        str | None,
        Option("The person in a WhatsApp or Telegram chat who is the assistant.", rare=True),
    ]
    encoding: Annotated[
        str | None,
        Option("The encoding of text files, for example cp932. Default: UTF-8.", rare=True),
    ]


class HubOptions(TypedDict, total=False):
    revision: Annotated[
        str | None,
        Option(
            "The branch, tag or commit of a Hub model. Only a commit fixes the files.",
            panel=BASE,
            rare=True,
        ),
    ]
    trust_remote_code: Annotated[
        bool,
        Option(
            "Run Python code that comes with the model, with all the rights you have.",
            panel=BASE,
            rare=True,
            default=False,
        ),
    ]


class DeviceOptions(HubOptions, total=False):
    device: Device


class StackOptions(DeviceOptions, total=False):
    allow_other_base: Annotated[
        bool,
        Option(
            "Accept an adapter whose fingerprint shows that it was trained on another base model.",
            panel=BASE,
            rare=True,
            default=False,
        ),
    ]


def _storage(auto: str, when: str = "") -> Option:
    text = (
        f"The quantization or dtype of the base model{when}: auto, {STORAGE_NAMES}."
        f" auto uses {auto}."
    )
    return Option(text, panel=BASE, default="auto")


class BaseOptions(StackOptions, total=False):
    storage: Annotated[
        str,
        _storage(
            "the quantization in the model's files, or else the adapters' in training, or else bf16"
            " or fp32, whichever is faster on the device"
        ),
    ]


class RowsOptions(DataOptions, BaseOptions, total=False): ...


class EstimateOptions(DataOptions, HubOptions, total=False): ...


class StudyOptions(DataOptions, DeviceOptions, total=False): ...


class TrainedBaseOptions(StackOptions, total=False):
    """Options for merging or exporting adapters; `storage` is the quantization or dtype of the base
    model during training.
    """

    storage: Annotated[str, _storage("the one in the adapters' records", " during training")]


class DirectoryBaseOptions(StackOptions, total=False):
    storage: Annotated[str, _storage("the one that most adapters were trained with")]
