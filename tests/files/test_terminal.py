"""Tables of 80 columns, of which nothing is cut."""

from lorafold.files.terminal import paragraph, text_table

HEAD = ("name", "of a long heading", "loss")


def test_headings_break_between_words_and_figures_stand_whole() -> None:
    shown = text_table(HEAD, [["lora", "0.5", "-0.1234 ±0.0123"], ["ia3", "12.5", "1"]])
    assert shown.splitlines() == [
        "name     of a             loss",
        "         long",
        "      heading",
        "----  -------  ---------------",
        "lora      0.5  -0.1234 ±0.0123",
        "ia3      12.5                1",
    ]


def test_a_long_name_goes_on_in_the_next_line() -> None:
    name, figure = "a-name/of-an-adapter-that-is-long", "9" * 20
    shown = text_table(HEAD, [[name, figure, figure]], width=60).splitlines()
    assert max(map(len, shown)) <= 60
    assert sum(line.count(figure) for line in shown) == 2
    [rule] = [n for n, line in enumerate(shown) if line.startswith("---")]
    size = len(shown[rule].split()[0])
    assert "".join(line[:size].strip() for line in shown[rule + 1 :]) == name
    figures = text_table(HEAD, [[name, figure, figure]], width=10)
    assert figures.count(figure) == 2  # wider than asked rather than cut


def test_a_sentence_goes_on_below_where_it_began() -> None:
    assert paragraph("one two three", "- ", 9) == ["- one two", "  three"]
    path = "/a/very/long/path"
    assert paragraph(f"see {path}", width=8) == ["see", path]
    assert paragraph("", "! ") == ["!"]


def test_a_range_breaks_where_there_is_no_room() -> None:
    cells = ["mlp.experts.gate_up_proj", "1.5 (1.0 to 2.0)", "2.5 (2.0 to 3.0)"]
    shown = text_table(HEAD, [cells], width=46).splitlines()
    assert max(map(len, shown)) <= 46
    assert {"(1.0", "2.0)", "(2.0", "3.0)"} < {*" ".join(shown).split()}
