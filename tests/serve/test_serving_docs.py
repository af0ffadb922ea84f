"""The pages on serving and the code have the same settings, errors, metrics and routes."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import lorafold.serving
from lorafold.serving.app import application
from lorafold.serving.routes.page import FILES
from lorafold.serving.settings import Limits, Settings
from serving_cases import Running

pytest_plugins = ["serving_fixtures"]
DOCS = Path(__file__).parents[2] / "docs"
SOURCE = sorted(Path(lorafold.serving.__file__).parent.rglob("*.py"))
DASHBOARD = DOCS / "grafana-dashboard.json"
OPERATE, METRICS = "serve-operate.md", "| metric | type | labels | meaning |"
ROUTES = "| route | who | purpose |"
CODE = re.compile(r"[a-z]+(_[a-z]+)+")
METRIC = re.compile(r"\blorafold_\w+")
ROUTERS = re.compile(r"\bvllm:\w+")  # for programs, which the dashboard has under names of its own


@pytest.fixture(scope="module")
def server(serve) -> Running:
    found = serve()
    found.text("a", "The")
    return found


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(name: str, heading: str) -> list[list[str]]:
    """The cells of the table that begins with that line."""
    table = page(name).partition(f"{heading}\n")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def families(server: Running) -> dict[str, str]:
    """The names of metrics as a query has them, with their kinds."""
    found = text_string_to_metric_families(server.metrics())
    kinds = {f.name + ("_total" if f.type == "counter" else ""): f.type for f in found}
    return {name: kind for name, kind in kinds.items() if not name.endswith("_created")}


def family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_every_metric_is_told_and_shown(server: Running) -> None:
    kinds = families(server)
    told = {row[0].strip("`"): row[1] for row in rows(OPERATE, METRICS)}
    assert told == kinds
    own = {name for name in kinds if METRIC.fullmatch(name)}
    assert {family(n) for n in METRIC.findall(page(OPERATE))} == own
    assert {family(n) for text in expressions() for n in METRIC.findall(text)} == own
    assert set(ROUTERS.findall(page(OPERATE))) == set(kinds) - own


def test_queries_ask_for_buckets_of_histograms_and_labels_that_exist(server: Running) -> None:
    kinds = families(server)
    labels = {row[0].strip("`"): set(row[2].split(", ")) for row in rows(OPERATE, METRICS)}
    for text in (*expressions(), page(OPERATE)):
        for name, selector in re.findall(r"\b(lorafold_\w+)\{([^}]*)\}", text):
            asked = set(re.findall(r"(\w+)=?[=!]~?\"", selector)) - {"job", "instance"}
            assert asked <= labels[family(name)], (name, asked)
        for name in METRIC.findall(text):
            assert family(name) == name or kinds[family(name)] == "histogram"
    for f in text_string_to_metric_families(server.metrics()):
        name = f.name + ("_total" if f.type == "counter" else "")
        for sample in f.samples:
            if name in labels:
                assert set(sample.labels) - {"le"} == labels[name] - {""}


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {one["name"]: one["type"] for one in board["templating"]["list"]}
    assert board["schemaVersion"] >= 39
    assert variables["datasource"] == "datasource"
    panels = board["panels"]
    assert {p["datasource"]["uid"] for p in panels} == {"${datasource}"}
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
    taken = [
        (x, y)
        for grid in (p["gridPos"] for p in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert max(x for x, _ in taken) < 24
    assert len(set(taken)) == len(taken)
    used = {name for text in expressions() for name in re.findall(r"\$(\w+)", text)}
    assert used <= {*variables, "__rate_interval"}


def test_the_settings_table_has_every_setting_with_its_default() -> None:
    told = {
        row[0].strip("`"): yaml.safe_load(row[1].strip("`"))
        for row in rows("serve-tenants.md", "| setting | default | meaning |")
    }
    own = {n: f.default for n, f in Settings.model_fields.items() if n != "limits"}
    limits = {f"limits.{name}": field.default for name, field in Limits.model_fields.items()}
    assert told == own | limits
    example = (
        page("serve-tenants.md").partition('```yaml title="serve.yaml"\n')[2].partition("```")[0]
    )
    Settings(**yaml.safe_load(example))


def raised() -> Iterator[tuple[str, int | None]]:
    """The codes that the source refuses with, and their status where it is written there."""
    for path in SOURCE:
        for outer in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
                for call in ast.walk(outer):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "Refusal":
                        yield from _codes(call, outer)


def _codes(call: ast.Call, outer: ast.AST) -> Iterator[tuple[str, int | None]]:
    status, code = call.args[:2]
    if isinstance(code, ast.Constant):
        number = int(ast.unparse(status)) if isinstance(status, ast.Constant) else None
        yield str(code.value), number
        return
    for one in ast.walk(outer):  # a variable: the codes are among the function's texts
        if isinstance(one, ast.Constant) and CODE.fullmatch(str(one.value)):
            yield str(one.value), None


def test_the_table_of_errors_has_every_code_with_its_status() -> None:
    table = rows("serve-api.md", "| status | code | what to do |")
    told = {row[1].strip("`"): {int(n) for n in row[0].split(", ")} for row in table}
    assert len(told) == len(table)
    source = list(raised())
    assert set(told) == {code for code, _ in source}
    assert [(code, n) for code, n in source if n is not None and n not in told[code]] == []


def served(server: Running) -> Iterator[str]:
    def below(routes: Any) -> Iterator[Any]:
        for route in routes:
            inner = getattr(route, "routes", None) or getattr(route, "original_router", None)
            if inner is None:
                yield route
            else:
                yield from below(getattr(inner, "routes", inner))

    for route in below(application(server.parts).routes):
        for method in sorted(route.methods - {"HEAD"}):
            yield f"{method} {route.path.replace(':path', '')}"


def test_the_table_of_routes_has_every_route(server: Running) -> None:
    table = rows("serve-api.md", ROUTES)
    told = [route for row in table for route in re.findall(r"`([A-Z]+ [^`]+)`", row[0])]
    files = {f"GET {path}" for path in FILES if path != "/"}  # of the page
    assert sorted(told) == sorted(set(served(server)) - files)
    anyone = [r for row in table if row[1] == "anyone" for r in re.findall(r"`GET (.*?)`", row[0])]
    for path in (*anyone, *FILES):
        assert server.ask(path).status == 200


def test_the_routes_of_administration_need_its_key(server: Running) -> None:
    table = rows("serve-api.md", ROUTES)
    for row in (row for row in table if row[1] == "admin"):
        for method, path in re.findall(r"`([A-Z]+) ([^`]+)`", row[0]):
            asked = path.format(name="a", act="pin")
            body = None if method in ("GET", "DELETE") else {"lora_name": "a", "target": "a"}
            assert server.ask(asked, body, method=method).code == "invalid_api_key"
