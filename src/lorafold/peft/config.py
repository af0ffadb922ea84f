"""Reading and writing of adapter_config.json, with fields of one method and fields of all methods.

    target_modules     a list: paths, or ends of paths; a string: a regular expression over whole
                       paths, or "all-linear" (all linear layers but the output layer)
    exclude_modules    the same forms, for modules to exclude; modules to save are excluded too
    layers_to_transform, layers_pattern    adapt only modules in the blocks with these numbers
    modules_to_save    suffixes of paths, which may begin inside a part of a path
    target_parameters, trainable_token_indices    see `form.py` and `tokens.py`

Unknown fields must be neutral (null, false, empty).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy, beneath, ends_in, last_part
from lorafold.core.attach import base_state
from lorafold.core.expert_matrices import Matrices, module_at
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches, match
from lorafold.errors import LorafoldError, join_problems, listed, truncate_middle
from lorafold.files.paths import nearest_name
from lorafold.layers import is_linear
from lorafold.methods.common.biases_and_modules import Bias
from lorafold.methods.common.trainable_tokens import TokenRows
from lorafold.models.sources import name_of_base
from lorafold.peft.derived import PREFIX
from lorafold.peft.form import AdapterFormat, rename_patterns, select, shortest_names
from lorafold.peft.table import METHODS, unlisted_methods
from lorafold.peft.table_lora import with_init
from lorafold.peft.table_types import Field, JsonObject, Method, Regex, TargetModule
from lorafold.peft.tokens import INDICES, TokenIds, config_entry

CONFIG = "adapter_config.json"
ANY_VALUE = TypeAdapter(Any)
WEIGHTS = "adapter_model.safetensors"


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A list as a tuple; any other value as a tuple of one element."""
    return tuple(value) if isinstance(value, list) else (value,)


def as_patterns(value: str | list[str]) -> Patterns:
    """Names as a tuple, or a regular expression. `all-linear` may be written in any case."""
    if not isinstance(value, str):
        return tuple(value)
    return value.lower() if value.lower() == "all-linear" else value


def as_ids(value: list[int] | dict[str, list[int]]) -> TokenIds:
    if isinstance(value, dict):
        return {name: tuple(ids) for name, ids in value.items()}
    return tuple(value)


SELECTION = (
    Field("target_modules", "target_modules", Regex | list[str], None, from_file=as_patterns),
    *(
        Field(key, attribute, kind | None, None, from_file=convert, empty=())
        for key, attribute, kind, convert in (
            ("modules_to_save", "modules_to_save", list[Regex], as_tuple),
            ("exclude_modules", "exclude_modules", Regex | list[str], as_patterns),
            ("layers_to_transform", "layers_to_transform", int | list[int], as_tuple),
            ("layers_pattern", "layers_pattern", Regex | list[Regex], as_tuple),
            (INDICES, "tokens", list[int] | dict[str, list[int]], as_ids),
        )
    ),
)
PARAMETERS = Field(
    "target_parameters", "target_parameters", list[str] | None, None, from_file=as_tuple, empty=()
)
BIAS = Field("bias", "bias", Bias, "none")
# fields about an adapter's origin, which do not affect its outputs
ORIGIN_FIELDS = frozenset({
    "peft_type", "task_type", "inference_mode", "peft_version", "auto_mapping",
    "base_model_name_or_path", "revision", "runtime_config",
})  # fmt: skip
# names that a method's options must not have
RESERVED_FIELDS = ORIGIN_FIELDS | {BIAS.key, PARAMETERS.key} | {field.key for field in SELECTION}


def missing_config_error(path: Path) -> LorafoldError:
    if path.is_file():
        own = (path.parent / CONFIG).is_file()
        hint = f"; use the directory of this file, {path.parent}" if own else "; this is a file"
    elif not path.exists():
        hint = "; the path does not exist" + nearest_name(path)
    elif inside := sorted(str(p.parent) for p in path.glob(f"*/{CONFIG}")):
        hint = f"; found an adapter in {listed(inside)}"
    elif (path / "config.json").is_file():
        hint = f"; this is a model, so pass it as --model {path}"
    else:
        hint = ""
    return LorafoldError(f"{path}: found no {CONFIG}, expected the directory of an adapter{hint}")


def write_config(
    model: nn.Module, spec: Spec, sites: Sequence[TargetModule], selection: PeftSelection,
    bias: Bias, form: AdapterFormat,
) -> dict[str, Any]:  # fmt: skip
    """The contents of adapter_config.json for an adapter on `model`, ready for JSON."""
    method = form.method
    if taken := sorted({f.key for f in method.fields} & RESERVED_FIELDS):
        raise LorafoldError(
            f"{method.spec.__name__}: found options {', '.join(taken)}, whose names are reserved in"
            " adapter configs; rename them"
        )
    task, heads = task_of(model)
    names = selection.modules_to_save
    # no task if PEFT would then look for heads that the adapter does not contain
    if heads and {*saved_leaves(model, (*names, *heads))} != {*saved_leaves(model, names)}:
        task = None
    config = method.config(spec, sites) | {
        "base_model_name_or_path": name_of_base(model) or None,
        "inference_mode": True,
        "modules_to_save": list(names) or None,
        "revision": None,
        "task_type": task,
    }
    if method.preset is None:
        targets = selection.target_modules
        config["target_modules"] = targets if isinstance(targets, str) else list(targets)
    if form.parameters:
        config[PARAMETERS.key] = list(selection.target_parameters)
        for key in ("rank_pattern", "alpha_pattern"):
            if values := config.get(key):
                config[key] = rename_patterns(values, form.parameters.items())
    if method.biases or bias != BIAS.default:
        config[BIAS.key] = bias
    rows = [(s.path, s.delta) for s in sites if isinstance(s.delta, TokenRows)]
    if own := {path: list(delta.ids) for path, delta in rows if delta.twin is None}:
        config |= config_entry(model, own)
    if form.dropout:
        config["lora_dropout"] = 0.0
    return dict(sorted(config.items()))


def read_config(config: JsonObject, called: str = CONFIG) -> tuple[Spec, PeftSelection, Bias]:
    """Parses adapter_config.json. The error lists invalid and unsupported fields."""
    method = method_of(config)
    spec, problems = method.read(config)
    shared: dict[str, Any] = {"experts": not method.of_peft}
    if method.preset is not None:
        shared |= {"target_modules": (), "preset": method.preset}
    if method.parameters and config.get(PARAMETERS.key) and config.get("target_modules") is None:
        config = {**config, "target_modules": []}
    fields = (
        *(f for f in SELECTION if method.preset is None or f.key in ("modules_to_save", INDICES)),
        *[PARAMETERS] * method.parameters,
        BIAS,
    )
    for field in fields:
        try:
            shared[field.attribute] = field.read(config)
        except LorafoldError as e:
            problems.append(str(e))
    marked = {key for key, mark in method.marks.items() if config.get(key) == mark}
    known = ORIGIN_FIELDS | {f.key for f in fields} | method.known | marked
    unknown = {k: v for k, v in sorted(config.items()) if k not in known and not is_neutral(v)}
    texts = {k: ANY_VALUE.dump_json(v).decode() for k, v in unknown.items()}
    problems += [f"{k}={truncate_middle(text, 80)} is not supported" for k, text in texts.items()]
    if problems or spec is None:
        raise LorafoldError(f"{called}: {join_problems(problems)}")
    bias = shared.pop("bias")
    return spec, PeftSelection(**shared), bias


def read_new(config: Any, model_type: str) -> tuple[Spec, PeftSelection, Bias]:
    """Parses a `peft.LoraConfig` for a new adapter. The error names unsupported settings."""
    if getattr(config, "peft_type", None) != "LORA":
        found = truncate_middle(repr(config), 60)
        raise LorafoldError(f"spec: found {found}, expected a spec, such as lf.LoRA(rank=16)")
    values = json.loads(json.dumps(config.to_dict(), default=sorted))  # without sets
    init, values["init_lora_weights"] = values["init_lora_weights"], True
    heads = dict((task, heads) for _, task, heads in TASKS).get(values["task_type"], ())
    values["modules_to_save"] = [*(values["modules_to_save"] or ()), *heads]
    if values["target_modules"] is None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        values["target_modules"] = DEFAULTS.get(model_type)
    spec: Any
    spec, selection, bias = read_config(values, "LoraConfig")
    over = with_init(spec.over if values["use_dora"] else spec, init)
    return replace(spec, over=over) if values["use_dora"] else over, selection, bias


def method_of(config: JsonObject) -> Method:
    """The row for a config in the table of methods."""
    kind = config.get("peft_type")
    of_kind = [m for m in METHODS if m.peft_type == kind]
    of_kind = of_kind or [m for m in unlisted_methods() if m.peft_type == kind]
    if not of_kind:
        expected = ", ".join(sorted({m.peft_type for m in (*METHODS, *unlisted_methods())}))
        own = str(kind).removeprefix("DORA_").startswith(PREFIX)
        hint = "; the code that registers this method must be imported first" * own
        raise LorafoldError(
            f"{CONFIG}: peft_type {kind!r} is not supported; expected one of {expected}{hint}"
        )
    return next(
        (m for m in of_kind if all(config.get(k, False) == mark for k, mark in m.marks.items())),
        of_kind[0],
    )


def is_neutral(value: Any) -> bool:
    """Whether this value of an unsupported key means that the option is off."""
    return value is None or value is False or value in ("", [], {})


Patterns = str | tuple[str, ...]
# (end of the model class's name, PEFT's task, heads that PEFT then adds to the modules to save)
TASKS = (
    ("ForCausalLM", "CAUSAL_LM", ()),
    ("LMHeadModel", "CAUSAL_LM", ()),
    ("ForSequenceClassification", "SEQ_CLS", ("classifier", "score")),
    ("ForTokenClassification", "TOKEN_CLS", ("classifier", "score")),
    ("ForQuestionAnswering", "QUESTION_ANS", ("qa_outputs",)),
)


@dataclass(frozen=True)
class PeftSelection:
    """The fields of a PEFT config that select modules, under PEFT's names."""

    target_modules: Patterns
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: Patterns = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    tokens: TokenIds = ()
    target_parameters: tuple[str, ...] = ()
    preset: str | None = None  # the fixed targets of the method, instead of target_modules
    experts: bool = False  # target_modules may match matrices of experts, unlike in PEFT

    def targets(self, model: nn.Module) -> Matches:
        """The target modules by pattern. Patterns without a match are omitted."""
        if self.preset is not None:
            return match(model, self.preset, is_linear)
        patterns = self.target_modules
        saved = [re.compile(rf"(^|.*\.){m}($|\..*)") for m in self.modules_to_save]
        modules = {
            p: m
            for p, m in Anatomy.of(model).modules
            if p and (self.experts or not isinstance(m, Matrices))
            if not (_matches(self.exclude_modules, p) or any(r.match(p) for r in saved))
        }
        if patterns == "all-linear":
            head = getattr(model, "get_output_embeddings", lambda: None)()
            linears = tuple(p for p, m in modules.items() if is_linear(m) and m is not head)
            matches = {patterns: linears}
        elif isinstance(patterns, str):
            matches = {patterns: tuple(p for p in modules if _matches(patterns, p))}
        else:
            hits: dict[str, list[str]] = {pattern: [] for pattern in patterns}
            of_layers = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
            of_layers = of_layers or [r".*?\.[^.]*\.(\d+)\."]
            for p in modules:
                if self.layers_to_transform:
                    number = next((m[1] for head in of_layers if (m := re.match(head, p))), None)
                    if number is None or int(number) not in self.layers_to_transform:
                        continue
                first = next((t for t in patterns if ends_in(p, t)), None)
                if first is not None:
                    hits[first].append(p)
            matches = {pattern: tuple(paths) for pattern, paths in hits.items()}
        if self.target_parameters:
            for name, sites in select(model, self.target_parameters).items():
                matches[name] = tuple(dict.fromkeys((*matches.get(name, ()), *sites)))
        if not any(matches.values()):
            keys = [key for key in ("target_modules", "target_parameters") if getattr(self, key)]
            shown = " and ".join(f"{key} {_in_text(getattr(self, key))}" for key in keys)
            raise LorafoldError(f"{shown or 'target_modules'} match no module of this model")
        return Matches({pattern: hits for pattern, hits in matches.items() if hits})

    def spec_in(self, model: nn.Module, spec: Spec) -> Spec:
        """The spec with the ranks and alphas that PEFT uses. For modules adapted as parameters,
        PEFT matches patterns with the path of the weight.
        """
        if not self.target_parameters:
            return spec
        sites = [p for hits in select(model, self.target_parameters).values() for p in hits]
        pairs = [(f"{p}.weight", p) for p in sites if not isinstance(module_at(model, p), Matrices)]
        ranks, alphas = (
            rename_patterns(values, pairs)
            for values in (spec.rank_pattern, spec.alpha_pattern)  # type: ignore[attr-defined]
        )
        return replace(spec, rank_pattern=ranks, alpha_pattern=alphas)  # type: ignore[type-var]

    def saved(self, model: nn.Module) -> Matches:
        """The modules to save, by name. Names without a match are omitted, because PEFT lists the
        heads of all architectures for a classifier.
        """
        paths = Anatomy.of(model).paths
        names = self.modules_to_save
        matches = {name: tuple(p for p in paths if p.endswith(name)) for name in names}
        return Matches({name: hits for name, hits in matches.items() if hits})

    def under(self, roots: Mapping[str, str]) -> PeftSelection:
        """The selection for a part of a model. `roots` maps paths in the part to paths in the whole
        model.
        """

        def inner(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {inner(name): ids for name, ids in value.items()}
            if isinstance(value, tuple):
                return tuple(map(inner, value))
            for a, b in roots.items() if isinstance(value, str) else ():
                for old, new in ((f"{b}.", f"{a}."), (re.escape(f"{b}."), re.escape(f"{a}."))):
                    value = value.replace(old, new)
            return value

        named = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
        return replace(self, **{name: inner(getattr(self, name)) for name in (*named, "tokens")})


def select_exactly(
    model: nn.Module,
    targets: Sequence[str],
    patterns: Sequence[str],
    saved: Sequence[str],
    names: Sequence[str],
    form: AdapterFormat,
) -> PeftSelection:
    """The simplest selection in PEFT's format that matches exactly these modules."""
    whole: tuple[str, ...] | None = ()
    if saved or names:
        ends = tuple(sorted({last_part(path) for path in saved}))
        tried = (_with_whole_heads(model, names), tuple(names), ends, tuple(saved))
        whole = next((s for s in tried if set(saved_leaves(model, s)) == set(saved)), None)
    if whole is None:
        extra = sorted(set(saved_leaves(model, saved)) - set(saved))
        raise LorafoldError(
            f"modules to save {listed(names)}: PEFT's format can't select them without"
            f" {listed(extra)}; add these to modules_to_save"
        )
    like = PeftSelection((), whole, experts=not form.method.of_peft)
    chosen = form.parameters.values()
    parameters = shortest_names(model, chosen) if chosen else ()
    modules = [path for path in targets if path not in form.parameters]
    if not modules:
        return replace(like, target_parameters=parameters)
    ends = tuple(sorted({last_part(path) for path in modules}))
    candidates: list[Patterns] = [ends, tuple(sorted(modules))]
    if not form.renamed:
        candidates.append("|".join(re.escape(p) for p in sorted(modules)))
        if len(patterns) == 1 and patterns[0] not in targets:
            candidates.insert(1, patterns[0])
    for candidate in candidates:
        selection = replace(like, target_modules=candidate)
        with suppress(LorafoldError):
            if set(selection.targets(model).paths) == set(modules):
                return replace(selection, target_parameters=parameters)
    raise LorafoldError(
        "PEFT's format can't select these target modules without others, because one path is the"
        " suffix of another"
    )


def task_of(model: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """PEFT's task type for the model, and the heads that PEFT saves for this task."""
    name = type(model).__name__
    return next(((task, heads) for end, task, heads in TASKS if name.endswith(end)), (None, ()))


def _with_whole_heads(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The names with whole heads in place of parts of heads, because PEFT would wrap both and has
    no key for the inner module.
    """
    _, heads = task_of(model)
    paths = PeftSelection((), heads).saved(model).paths

    def whole(name: str) -> str:
        matched = PeftSelection((), (name,)).saved(model).paths
        around = {h for h in paths for p in matched if p.startswith(f"{h}.")}
        inside = matched and all(p.startswith(tuple(f"{h}." for h in around)) for p in matched)
        return next(iter(around)) if inside and len(around) == 1 else name

    return tuple(dict.fromkeys(map(whole, names)))


def saved_leaves(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The paths of all modules with parameters inside these `modules_to_save`."""
    inside = beneath(PeftSelection((), tuple(names)).saved(model).paths)
    return [path for path, m in Anatomy.of(model).modules if m._parameters and inside(path)]


def buffers_beneath(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The persistent floating-point buffers (any shape) inside these `modules_to_save`, by name."""
    inside, state = beneath(PeftSelection((), tuple(names)).saved(model).paths), base_state(model)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if inside(name) and name in state and buffer.is_floating_point()
    }


def _matches(patterns: Patterns, path: str) -> bool:
    if isinstance(patterns, str):
        return bool(patterns) and re.fullmatch(patterns, path) is not None
    return any(ends_in(path, p) for p in patterns)


def _in_text(patterns: Patterns) -> str:
    return repr(patterns) if isinstance(patterns, str) else ", ".join(patterns)
