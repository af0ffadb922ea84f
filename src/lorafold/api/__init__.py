"""The verbs of `import lorafold as lf`, such as `lf.train`, each in a file of its own.

Each takes plain arguments (names, paths, rows, or a loaded model), opens what they name, calls the
packages below, and returns a frozen dataclass. It prints nothing unless a rich console is given;
training alone shows its progress on a terminal and in a notebook, unless it is told not to.
The commands of `lorafold.cli` parse their options and call these functions.
"""
