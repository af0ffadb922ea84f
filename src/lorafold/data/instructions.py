"""What stands in a row beside messages, or in place of them: a system message, instructions with
their answers, and questions answered by calls.

    {"instruction": "Add.", "input": "1, 2", "output": "3"}             Alpaca's
    {"instruction": "Add.", "context": "1, 2", "response": "3"}         Dolly's
    {"query": "Add 1 and 2.", "answers": calls, "tools": [...]}         calls as a list, or its JSON
"""

from collections.abc import Iterator

from lorafold.data.messages import Message, call_of, call_problems, text_problems
from lorafold.data.parsing import Row, parsed


def instruction_problems(answered: str, beside: str, row: Row) -> Iterator[str]:
    """What is wrong with a row of an instruction.

    Args:
        answered: The key of the answer.
        beside: That of what the instruction is about, which may be absent.
        row: Has the instruction and the answer.
    """
    for key in ("instruction", answered, *([beside] if row.get(beside) is not None else [])):
        yield from text_problems(key, row[key])


def instruction(answered: str, beside: str, row: Row) -> list[Message]:
    """The messages of a checked row of an instruction, whose keys are those of its problems."""
    asked = "\n".join(filter(None, (row["instruction"], row.get(beside))))
    answer = {"role": "assistant", "content": row[answered]}
    return [{"role": "user", "content": asked}, answer]


def query_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row of a question that calls answer."""
    yield from text_problems("query", row["query"])
    try:
        yield from call_problems("answers", _answers(row))
    except ValueError as error:
        yield f"field answers: found no JSON ({error}), expected that of a list of calls"


def query(row: Row) -> list[Message]:
    """The messages of a checked row of a question that calls answer."""
    calls = [call_of(call) for call in _answers(row)]
    return [{"role": "user", "content": row["query"]}, {"role": "assistant", "tool_calls": calls}]


def system_problems(row: Row, wrong: bool) -> Iterator[str]:
    """What is wrong with the system message that stands beside what is said in a row.

    Args:
        row: The row, which has one.
        wrong: Whether something is wrong with the rest of it.
    """
    yield from text_problems("system", row["system"])
    if not wrong and row["system"] and _own_system(row) not in (None, row["system"]):
        yield "field system: found beside another system message, expected one of the two"


def system_of(row: Row) -> list[Message]:
    """The system message that stands beside what is said in a checked row, unless that has it."""
    if not row.get("system") or _own_system(row) is not None:
        return []
    return [{"role": "system", "content": row["system"]}]


def _own_system(row: Row) -> str | None:
    """The system message with which the messages of a row begin."""
    for key in ("messages", "conversations", "prompt", "chosen"):
        first = row[key][0] if isinstance(row.get(key), list) and row[key] else None
        if isinstance(first, dict) and "system" in (first.get("role"), first.get("from")):
            return str(first.get("content", first.get("value")))
    return None


def _answers(row: Row) -> list[dict[str, object]]:
    """The calls of a row. ValueError where they are no JSON."""
    answers = row["answers"]
    return parsed(answers) if isinstance(answers, str) else answers
