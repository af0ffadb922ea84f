"""The library's verbs, one a file: what `import lorafold as lf` offers beside adapters themselves.

Each takes plain arguments (names, paths, rows, or a model that is loaded already), opens what they
name, calls the packages below, and returns a frozen dataclass. Nothing is printed unless a rich
console is given. The commands of `lorafold.cli` parse their options and call these.
"""
