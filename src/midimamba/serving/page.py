"""The page at /docs: what /openapi.json says, as plain HTML that needs no script and no network."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from midimamba.text import for_html

_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8888; padding-top: 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { overflow-x: auto; padding: 0.8rem; background: #8882; border-radius: 4px; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: 0.2rem 1rem 0.2rem 0; }
:root { color-scheme: light dark; }"""


def docs_page(api: Mapping[str, Any]) -> str:
    """The page.

    Args:
        api (`Mapping[str, Any]`): what FastAPI's `openapi()` returns.
    """
    title = for_html(f"{api['info']['title']} {api['info']['version']}")
    parts = [f"<h1>{title}</h1>", _text(api["info"]["description"])]
    parts.append('<p>For tools that read OpenAPI: <a href="openapi.json">openapi.json</a></p>')
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            parts += _operation(f"{method.upper()} {path}", operation, api)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head>
<body>{"".join(parts)}</body></html>
"""


def _operation(name: str, operation: Mapping[str, Any], api: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{for_html(name)}</code></h2><h3>{for_html(operation['summary'])}</h3>"
    yield _text(operation.get("description", ""))
    if example := operation.get("x-example"):
        yield f"<pre>{for_html(example)}</pre>"
    body = operation.get("requestBody", {}).get("content", {})
    for kind, content in body.items():
        yield f"<h4>Body: <code>{for_html(kind)}</code></h4>"
        yield _fields(_resolved(content["schema"], api))
    if parameters := operation.get("parameters"):
        rows = [_row(f"{one['name']} ({one['in']})", one, one["schema"], api) for one in parameters]
        yield f"<h4>Parameters</h4><table>{''.join(rows)}</table>"
    yield "<h4>Answers</h4><table>"
    for status, answer in operation["responses"].items():
        kinds = answer.get("content", {})
        shown = ", ".join(f"<code>{for_html(kind)}</code>" for kind in kinds)
        yield f"<tr><th>{for_html(status)}</th><td>{_text(answer['description'])}</td><td>{shown}</td></tr>"
    yield "</table>"
    for content in operation["responses"].get("200", {}).get("content", {}).values():
        schema = _resolved(content.get("schema", {}), api)
        yield _fields(schema) if "properties" in schema else ""
        yield f"<pre>{_lines(content['example'])}</pre>" if "example" in content else ""


def _resolved(schema: Mapping[str, Any], api: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or what it refers to."""
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = api["components"]["schemas"][name] if name else schema
    return found


def _fields(schema: Mapping[str, Any]) -> str:
    rows = [_row(name, field, field, schema) for name, field in schema.get("properties", {}).items()]
    return f"<table>{''.join(rows)}</table>"


def _row(name: str, described: Mapping[str, Any], schema: Mapping[str, Any], owner: Mapping[str, Any]) -> str:
    """What one option is: its name, its description and what it is by default."""
    required = described.get("required") is True or name in owner.get("required", ())
    note = "required" if required else f"default: {json.dumps(schema['default'])}" if "default" in schema else ""
    if note == "default: null":
        note = ""
    cells = f"<td>{_text(described.get('description', ''))}</td><td>{for_html(note)}</td>"
    return f"<tr><th><code>{for_html(name)}</code></th>{cells}</tr>"


def _text(text: str) -> str:
    return for_html(" ".join(text.split())).replace("`", "")


def _lines(text: str) -> str:
    return "\n".join(map(for_html, text.splitlines()))
