"""What the site needs besides Markdown: notebooks as pages, and formulas as MathML.

`notebooks/x.ipynb` becomes the page `notebooks/x.md` and its figures `notebooks/x_1.png`, ...;
nothing is executed. Browsers show MathML without a script, a font or a network.
"""

import base64
import html as entities
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def on_files(files, config):
    """Add a page for every notebook, and a file for every figure."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text, figures = converted(nbformat.read(path, as_version=4), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, figure in figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=figure))
    return files


def on_page_content(html, page, config, files):
    """Formulas, and bars in tables: in a cell, `\\|` in code is a bar. GitHub and editors need the
    backslash, Python-Markdown would show it.
    """
    for item in page.toc:
        _name_formulas(item)
    cell = lambda found: re.sub(
        r"<code>.*?</code>", lambda code: code[0].replace(r"\|", "|"), found[0]
    )
    return with_formulas(re.sub(r"<td.*?</td>", cell, html, flags=re.DOTALL))


def with_formulas(html):
    """Formulas as MathML: pymdownx.arithmatex has marked `\\( ... \\)` and `\\[ ... \\]`."""
    marked = re.compile(r"""<(span|div) class="arithmatex">(.*?)</\1>""", re.DOTALL)

    def formula(found):
        text = entities.unescape(found[2]).strip()
        display = "block" if text.startswith(r"\[") else "inline"
        return f"<{found[1]} class='formula'>{convert(text[2:-2], display=display)}</{found[1]}>"

    return marked.sub(formula, html)


def _name_formulas(item):
    """In a table of contents a formula stands as its source."""
    item.title = re.sub(r"\\\((.*?)\\\)", r"\1", item.title)
    for child in item.children:
        _name_formulas(child)


def on_serve(server, config, builder):
    """Build again when a notebook changes."""
    server.watch(str(FOLDER))


def converted(notebook, stem):
    """The Markdown of a notebook, and its figures by name. **Raises:** `ValueError` for an output
    that has no place on a page.
    """
    parts, figures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed = None  # the part that further lines of the same output continue
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}_{len(figures) + 1}.png"
                figures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![]({name})")
                printed = None
            elif output.output_type == "stream" and printed is None:
                printed = output.text
                parts.append(f"```text\n{printed.rstrip()}\n```")
            elif output.output_type == "stream":
                printed += output.text
                parts[-1] = f"```text\n{printed.rstrip()}\n```"
            else:
                raise ValueError(
                    f"{stem}: In [{cell.execution_count}] left "
                    f"{sorted(data) or output.output_type}, "
                    "which is neither text nor PNG"
                )
    return "\n\n".join(parts) + "\n", figures
