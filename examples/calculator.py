"""Tools for arithmetic, and a reward for the right answer.

lorafold train --objective grpo --data rows.jsonl --tools calculator.py \
    --reward reward.py:right --chat-template tools --out calculator
"""


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def multiply(a: int, b: int) -> int:
    """
    Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b
