"""Write the tutorial as a notebook: the text of the README, its Python blocks and their outputs.

    python -m tools.notebook

Blocks marked `python` become cells and are run in order; other blocks, quotes of the source (`py`)
among them, stay text. Pictures are embedded, so the notebook can be read without the repository.
"""

import base64
import dataclasses
import mimetypes
import os
import pathlib
import re
import urllib.parse

import nbformat
import tyro
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from support.errors import atomic_write, exit_on_user_error

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'docs'      # the notebook's, in which it is run and to which its links are relative

FIRST_TEXT = """\
*This notebook has the text and the code of [README.md](README.md). `make notebook` writes it. Its \
blocks import `model.py`, `utils.py` and the other files of the repository, in the environment of \
`make setup`, so the first of them changes to the repository's folder.*"""
FIRST_CODE = """\
import os

if not os.path.exists('model.py'):
    os.chdir('..')"""

HTML_PICTURE = re.compile(r'(?:<picture>(?:(?!<img).)*)?<img([^>]*)>(?:\s*</picture>)?', re.DOTALL)
PICTURE = re.compile(r'!\[([^]]*)\]\(([^)\s]+)\)')
FORMULA = re.compile(r'^```math\n(.*?)^```$', re.MULTILINE | re.DOTALL)    # only GitHub's
LINK = re.compile(r'(?<=\]\()([^()\s#]*)(#[^()\s]+)?(?=\))')


@dataclasses.dataclass
class Parameters:
    """Write the tutorial as a notebook."""

    # The Markdown file; its links are relative to the repository's folder.
    text: str = str(ROOT / 'README.md')
    # File for the notebook.
    output: str = str(FOLDER / 'tutorial.ipynb')


@exit_on_user_error
def main(parameters):
    """Make the notebook, run it and write it."""
    notebook = make_notebook(pathlib.Path(parameters.text).read_text(encoding='utf-8'))
    # Without the kernel's warning that its connection, within this computer, is not encrypted.
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True,
                   extra_arguments=['--log-level=ERROR'],
                   resources={'metadata': {'path': str(FOLDER)}}).execute()
    notebook.metadata.language_info = {'name': 'python'}    # without this computer's version
    with atomic_write(parameters.output) as path:
        nbformat.write(notebook, path)
    print(parameters.output)


def make_notebook(text):
    """Return a notebook of a Markdown text, not run yet."""
    tokens = MarkdownIt('commonmark').use(anchors_plugin, max_level=6).parse(text)
    anchors = {}
    for token, title in zip(tokens, tokens[1:]):
        if token.type == 'heading_open':
            # Jupyter's anchor of a heading is its text with hyphens.
            plain = ''.join(child.content for child in title.children)
            anchors[f'#{token.attrGet("id")}'] = '#' + urllib.parse.quote(plain.replace(' ', '-'))
    cells = [make_markdown_cell(FIRST_TEXT, {}), new_code_cell(FIRST_CODE)]
    for kind, source in split(text, tokens):
        cells.append(new_code_cell(source) if kind == 'code'
                     else make_markdown_cell(source, anchors))
    for number, cell in enumerate(cells):
        cell.id = f'cell-{number}'      # in place of a random one
    kernel = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
    return new_notebook(cells=cells, metadata={'kernelspec': kernel})


def split(text, tokens):
    """Yield the sections of a text and its Python blocks, as ('markdown' or 'code', source)."""
    lines = text.splitlines(keepends=True)
    start = 0
    for token in tokens:
        is_block = token.type == 'fence' and token.info == 'python' and token.level == 0
        if is_block or token.type == 'heading_open' and token.level == 0:
            first, last = token.map
            if source := ''.join(lines[start:first]).strip():
                yield 'markdown', source
            if is_block:
                yield 'code', token.content.rstrip()
            start = last if is_block else first
    if source := ''.join(lines[start:]).strip():
        yield 'markdown', source


def make_markdown_cell(source, anchors):
    """Return a cell with embedded pictures, and with links for the notebook's folder."""
    attachments = {}

    def convert(match):
        """Return the Markdown of a picture in HTML; of its variants the one for light pages."""
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
        return f'![{attributes["alt"]}]({attributes["src"]})'

    def embed(match):
        """Attach a picture to the cell."""
        path = ROOT / match[2]
        content = base64.b64encode(path.read_bytes()).decode()
        attachments[path.name] = {mimetypes.guess_type(path)[0]: content}
        return f'![{match[1]}](attachment:{path.name})'

    def adapt(match):
        """Make a link relative to the notebook's folder, and an anchor one of Jupyter's."""
        path, anchor = match[1], match[2] or ''
        if not path:
            return anchors.get(anchor, anchor)
        return os.path.relpath(ROOT / path, FOLDER) + anchor if (ROOT / path).exists() else match[0]

    source = PICTURE.sub(embed, HTML_PICTURE.sub(convert, source))
    source = FORMULA.sub(r'$$\n\1$$', source)
    return new_markdown_cell(LINK.sub(adapt, source), attachments=attachments)


if __name__ == '__main__':
    main(tyro.cli(Parameters))
