"""An environment: the model guesses a number from 0 to 9.

lorafold train --objective grpo --data rows.jsonl --environment guess.py:Guess --out guesser

Each row has a prompt, which is replaced here, and the number as `secret`.
"""

import re


class Guess:
    def reset(self, secret):
        self.secret, self.guesses = secret, []
        return "Guess my number from 0 to 9. Answer with one digit."

    def step(self, text):
        digits = re.findall(r"\d+", text)
        self.guesses.append(int(digits[0]) if digits else None)
        guess = self.guesses[-1]
        if guess == self.secret or len(self.guesses) == 4:
            return None
        if guess is None:
            return "Answer with one digit."
        return "Higher." if guess < self.secret else "Lower."

    def reward(self):
        if self.guesses[-1] == self.secret:
            return 1.2 - 0.2 * len(self.guesses)
        return 0.0
