"""Docstrings in the Hugging Face form as Markdown: an extension of griffe, which reads the package for mkdocstrings.

`Args:` and its kin become headings with lists, in which types, shapes and defaults stand as the docstring has them.
References such as [`~midimamba.modeling.policy.Policy`], [`Policy`] or [`place`] become links to the API page, or code
where it does not document them. A reference that leads to nothing is a warning, which ends a strict build.
"""

import re
from collections.abc import Iterator

import griffe

LOGGER = griffe.get_logger(__name__)
PACKAGE = "midimamba"
SECTIONS = ("Args", "Parameters", "Attributes", "Raises", "Returns", "Yields")
_LISTS = ("Args", "Parameters", "Attributes", "Raises")
_HEADING = re.compile(rf"({'|'.join(SECTIONS)}):")
_ITEM = re.compile(r"([\w*][\w*, ]*?)(?: \((.+?)\))?:(?:\s+(.*))?")
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")


def to_markdown(text: str) -> str:
    """
    A docstring without its indentation, as Markdown.

    Args:
        text (`str`): in the Hugging Face form.
    """
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        words = line.strip()
        if heading := _HEADING.fullmatch(line):
            section = heading[1]
            lines += ["", f"**{section}**", ""]
            continue
        if words and not line.startswith(" ") and section:
            section = ""
            lines.append("")
        if words.startswith("> Parameters that"):
            lines += ["", f"*{words[2:]}:*", ""]
        elif not section:
            lines.append(line)
        else:
            lines.append(_in_section(line, section))
    return "\n".join(lines)


def _in_section(line: str, section: str) -> str:
    """A line under a heading: an item of a list, or the text of one."""
    line = line.removeprefix("    ")
    if section not in _LISTS or line.startswith(" "):
        return line
    item = _ITEM.fullmatch(line)
    if item is None:
        return line
    names, kind, rest = item.groups()
    shown = ", ".join(f"`{name.strip()}`" for name in names.split(","))
    return f"- **{shown}**{f' ({kind})' if kind else ''}: {rest or ''}".rstrip()


def objects_of(parent: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that is defined in it."""
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            yield from objects_of(member)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites all docstrings of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: object) -> None:
        if pkg.name != PACKAGE:
            return
        self.package = pkg
        everything = list(objects_of(pkg))
        self.paths = {item.path for item in everything}
        self.by_name: dict[str, set[str]] = {}
        for item in everything:
            if item.is_class or item.is_function or (item.parent is not None and item.parent.is_module):
                self.by_name.setdefault(item.name, set()).add(item.path)
        for item in everything:
            if item.docstring is not None:
                item.docstring.value = self.rewrite(item.docstring.value, item)

    def rewrite(self, text: str, where: griffe.Object) -> str:
        """A docstring as Markdown, with links."""

        def link(match: re.Match[str]) -> str:
            short, name = match[1], match[2]
            shown = name.rsplit(".", 1)[-1] if short else name
            path = self.find(name, where)
            if path is None:
                if name.split(".")[0] == PACKAGE or "." not in name:
                    LOGGER.warning("%s: its docstring refers to `%s`, which does not exist", where.path, name)
                return f"`{shown}`"
            return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

        return _REFERENCE.sub(link, to_markdown(text))

    def find(self, name: str, where: griffe.Object) -> str | None:
        """The full path of what a docstring calls `name`; `None` if the package has none, or several."""
        if name.startswith(f"{PACKAGE}."):
            return self.find_path(name)
        scope: griffe.Object | None = where
        while scope is not None:
            if f"{scope.path}.{name}" in self.paths:
                return f"{scope.path}.{name}"
            scope = scope.parent if isinstance(scope.parent, griffe.Object) else None
        first, _, rest = name.partition(".")
        found = {f"{path}.{rest}" if rest else path for path in self.by_name.get(first, ())} & self.paths
        if len(found) > 1:
            imported = where.module.members.get(first)
            target = imported.target_path if isinstance(imported, griffe.Alias) else ""
            found &= {f"{target}.{rest}" if rest else target}
        return found.pop() if len(found) == 1 else None

    def find_path(self, path: str) -> str | None:
        """Where the object of a full path is defined, which may be elsewhere if a module imports it."""
        try:
            item = self.package[path.removeprefix(f"{PACKAGE}.")]
            return item.final_target.path if isinstance(item, griffe.Alias) else item.path
        except (KeyError, griffe.AliasResolutionError):
            return None


Extension = HuggingFaceDocstrings
