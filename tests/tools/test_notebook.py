"""Tests of tools/notebook.py, and of the notebook that it wrote."""

import base64

import nbformat

from tools import notebook

TEXT = '''# A title, a comma
See [below](#more-text), [page](docs/web.md#how), [code](model.py), [paper](https://a.org).

```math
a = b
```

```py
# a quote, not run
layers[name](feats)
```

```python
x = 1
print(x)    # 1
```

* A list:

  ```python
  print(x)
  ```

## More `text`
<picture><source media="(prefers-color-scheme: dark)" srcset="img/dark/nms.png">
<img alt="Some boxes" src="img/nms.png"></picture> and ![A photo](img/demo.jpg)
'''


def test_blocks_become_cells_and_text_stays():
    cells = notebook.make_notebook(TEXT).cells[2:]
    assert [cell.cell_type for cell in cells] == ['markdown', 'code', 'markdown', 'markdown']
    first, code, item, last = cells
    assert first.source.startswith(
        '# A title, a comma\nSee [below](#More-text), [page](web.md#how), [code](../model.py), '
        '[paper](https://a.org).\n\n$$\na = b\n$$\n')
    assert 'layers[name](feats)' in first.source
    assert code.source == 'x = 1\nprint(x)    # 1'
    assert item.source.startswith('* A list:')
    assert last.source == ('## More `text`\n![Some boxes](attachment:nms.png) and '
                           '![A photo](attachment:demo.jpg)')
    (kind, content), = last.attachments['demo.jpg'].items()
    assert kind == 'image/jpeg'
    assert base64.b64decode(content) == (notebook.ROOT / 'img' / 'demo.jpg').read_bytes()


def test_notebook_runs_and_is_that_of_the_readme(tmp_path):
    path = tmp_path / 'tutorial.ipynb'
    notebook.main(notebook.Parameters(output=str(path)))
    written, kept = (nbformat.read(file, 4) for file in (path, notebook.FOLDER / 'tutorial.ipynb'))
    nbformat.validate(written)
    for cell, kept_cell in zip(written.cells, kept.cells):
        assert cell == kept_cell, 'make notebook writes it again'
    assert len(written.cells) == len(kept.cells)
    outputs = [output for cell in written.cells for output in cell.get('outputs', [])]
    assert len(outputs) > 10
    assert {(output.output_type, output.name) for output in outputs} == {('stream', 'stdout')}
