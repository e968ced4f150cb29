"""README.md: its Python runs and prints what it says, and all that it names is there.

In a Python block, what a line that begins with `print(` prints stands behind it as a comment, or in
the comment line below. The blocks run in order in one namespace, in a folder with the files that
they open: photo.jpg, and checkpoints of random weights.
"""

import builtins
import dataclasses
import importlib
import inspect
import re
import shlex

import pytest
from conftest import ROOT
from PIL import Image
from torch import nn

import detect
from model import SSD300
from utils import label_map, save_checkpoint

TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
FENCED = re.compile(r'^( *)```(\w*)\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)
PROSE = re.sub(r'<!--.*?-->', '', FENCED.sub('', TEXT), flags=re.DOTALL)
MODULES = {path.stem: importlib.import_module(path.stem) for path in ROOT.glob('*.py')
           if path.stem != 'benchmark'}

# Names in backticks that are other programs', or parts of files and messages.
OTHERS = {'log.csv', 'SIGTERM', 'avx512_bf16', 'ceil_mode', 'label_map.json', 'torch.load'}
TORCHRUN = {'--nproc-per-node', '--nnodes', '--rdzv-backend', '--rdzv-endpoint', '--standalone',
            '--node-rank', '--master-addr', '--master-port'}


def blocks(language):
    """The fenced blocks of a language, without the indentation of a list."""
    return [''.join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
            for indent, kind, body in FENCED.findall(TEXT) if kind == language]


def options_of(script):
    """The flags of a script, from its Parameters."""
    options = {'--help'}
    for field in dataclasses.fields(importlib.import_module(script.removesuffix('.py')).Parameters):
        name = field.name.replace('_', '-')
        options |= {f'--{name}'} | ({f'--no-{name}'} if isinstance(field.default, bool) else set())
    return options


# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


def promised_lines(block):
    """What the lines with `print(` promise, in order."""
    promised, lines = [], block.splitlines()
    for number, line in enumerate(lines):
        if line.startswith('print('):
            comment = line.rpartition('  # ')[2] if '  # ' in line else lines[number + 1][2:]
            promised.append(comment.strip())
    return promised


def test_python_blocks_print_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, 'show', lambda image, *args: None)
    Image.effect_noise((120, 90), 80).convert('RGB').save('photo.jpg')
    for name in set(re.findall(r"[\w./]+\.pth\.tar", TEXT)):
        if '/' not in name:
            save_checkpoint(name, model=SSD300(21).state_dict(), label_map=label_map)
    detect.default_model.cache_clear()
    namespace = {}
    python = blocks('python')
    assert len(python) > 10
    for block in python:
        exec(compile(block, 'README.md', 'exec'), namespace)
        printed = capsys.readouterr().out.splitlines()
        assert printed == promised_lines(block)
    detect.default_model.cache_clear()


def test_shell_blocks_name_scripts_options_and_targets_that_are_there():
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    n_commands = 0
    for block in blocks('bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            if 'make' in words[:1]:
                assert set(words[1:words.index('&&') if '&&' in words else None]) <= targets, line
            scripts = [word for word in words if word.endswith('.py')]
            for word in scripts[:1]:
                n_commands += 1
                assert (ROOT / word).is_file(), line
                place = words.index(word)
                for part, allowed in ((words[:place], TORCHRUN),
                                      (words[place:], options_of(word))):
                    flags = {word.partition('=')[0] for word in part if word.startswith('--')}
                    assert flags <= allowed, f'{line}: {flags - allowed}'
    assert n_commands > 10


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def all_names():
    """What the code defines: names of modules, classes and functions; and of anything else.

    The second set has layers, parameters, arguments and variables.
    """
    defined, names = set(dir(builtins)) | set(MODULES), set()
    model = SSD300(2)
    names |= {part for name, _ in model.named_modules() for part in name.split('.')}
    names |= {name.split('.')[-1] for name in (*model.state_dict(), *dict(model.named_buffers()))}
    for module_name, module in MODULES.items():
        for name, value in vars(module).items():
            defined |= {name, f'{module_name}.{name}'}
            functions = {name: value}
            if inspect.isclass(value) and value.__module__ == module_name:
                defined |= {f'{name}.{attribute}' for attribute in dir(value)}
                defined |= set(dir(value)) - set(dir(nn.Module))
                functions = vars(value)
                if dataclasses.is_dataclass(value):
                    names |= {field.name for field in dataclasses.fields(value)}
            for function in functions.values():
                function = inspect.unwrap(getattr(function, '__func__', function))
                if inspect.isfunction(function):
                    names |= set(inspect.signature(function).parameters)
                    names |= set(function.__code__.co_varnames)
    return defined, defined | names


def test_names_in_backticks_are_there():
    defined, known = all_names()
    known |= OTHERS
    every_option = set().union(*(options_of(f'{name}.py') for name in (*MODULES, 'benchmark')
                                 if hasattr(importlib.import_module(name), 'Parameters')))
    codes = re.findall(r'`([^`\n]+)`', PROSE)
    checked = 0
    for code in codes:
        first = code.split()[0]
        call = re.fullmatch(r'([A-Za-z_][\w.]*)\(.*\)', code)
        if re.fullmatch(r'[\w/]+\.(py|md|txt)', first):
            assert (ROOT / first).is_file() or first in ('trainval.txt', 'test.txt'), code
        elif call:
            assert call[1] in defined, code
        elif re.fullmatch(r'[A-Za-z_]\w*\.[A-Za-z_]\w*', code) and code.split('.')[0] in known:
            assert code in known, code
        elif re.fullmatch(r'[a-z]+(_[a-z0-9]+)+|[A-Z][a-z]+[A-Z]\w+|[A-Z]+_[A-Z_]+|_[a-z]+', code):
            assert code in known or code.startswith('_'), code
        else:
            continue
        checked += 1
    assert checked > 60
    for code in codes:
        for option in re.findall(r'(?<!\S)--[a-z][\w-]*', code):
            assert option in every_option | TORCHRUN or code.startswith('tensorboard'), code


def test_code_named_with_its_file_is_in_that_file():
    # "`evaluate()` in `eval.py`", the way the text points to a place
    places = re.findall(r'`(\w+)(?:\(\))?`\s+in\s+`(\w+)\.py`', PROSE)
    assert places
    for name, module in places:
        assert hasattr(MODULES[module], name), f'{name} in {module}.py'


# --------------------------------------------------------------------------------------------------
# Links and pictures
# --------------------------------------------------------------------------------------------------


def anchors():
    """The anchors of the headings, by GitHub's rule."""
    found = []
    for heading in re.findall(r'^#{1,6} (.+)$', FENCED.sub('', TEXT), re.MULTILINE):
        heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
        anchor = re.sub(r'[^\w\- ]', '', heading).replace(' ', '-')
        number = sum(re.fullmatch(rf'{re.escape(anchor)}(-\d+)?', other) is not None
                     for other in found)
        found.append(f'{anchor}-{number}' if number else anchor)
    return found


def test_links_lead_somewhere():
    links = re.findall(r'(?<!!)\[[^]]+\]\(([^)\s]+)\)', PROSE)
    assert len(links) > 20
    for link in links:
        path, _, anchor = link.partition('#')
        if link.startswith('#'):
            assert anchor in anchors(), link
        elif not link.startswith('https://'):
            assert (ROOT / path).exists(), link


PICTURES = re.findall(r'!\[([^]]*)\]\(([^)\s]+)\)', PROSE)


@pytest.mark.parametrize('text, path', PICTURES, ids=[path for _, path in PICTURES])
def test_picture_is_there_and_has_a_text(text, path):
    assert len(text) > 20
    assert (ROOT / path).is_file(), f'{path} is missing'
    with Image.open(ROOT / path) as picture:
        picture.verify()


def test_sections_of_the_tutorial_stand_in_their_order():
    titles = re.findall(r'^##? (.+)$', FENCED.sub('', TEXT), re.MULTILINE)
    order = ['What it scores and costs', 'Two commands', 'The idea', 'Boxes', 'Jaccard overlap',
             'Base, auxiliary and prediction convolutions', 'Priors',
             'Predictions vis-a-vis priors', 'Matching', 'MultiBox loss', 'Detection',
             'Data and augmentation', 'Training', 'Mean average precision', 'Past SSD300',
             'Using it', 'Differences from the paper', 'Questions and answers']
    assert [title for title in titles if title in order] == order


def test_numbers_of_the_priors_table_are_the_codes():
    from model import FEATURE_MAPS, N_PRIORS

    table = TEXT.partition('\n## Priors\n')[2].partition('\n## ')[0]
    for map_ in FEATURE_MAPS:
        n_priors = map_.size ** 2 * map_.n_priors_per_cell
        row = next(line for line in table.splitlines() if line.startswith(f'| {map_.name} |'))
        cells = [cell.strip() for cell in row.strip('|').split('|')]
        assert cells[1] == f'{map_.size} x {map_.size}' and float(cells[2]) == map_.scale
        assert cells[4:] == [str(map_.n_priors_per_cell), str(n_priors)]
    assert f'**{N_PRIORS}**' in table


def test_receptive_fields_are_those_of_the_layers():
    model, side, step, fields = SSD300(2), 1, 1, {}
    for name, layer in (*model.base.named_children(), *model.aux_convs.named_children()):
        kernel, stride, dilation = (
            value if isinstance(value, int) else value[0]
            for value in (layer.kernel_size, layer.stride, layer.dilation))
        side += (kernel - 1) * dilation * step
        step *= stride
        fields[name] = (side, side + 2 * step)    # of a cell, and of a 3 x 3 kernel on it
    table = TEXT.partition('**What each map sees.**')[2].partition('\n\n**')[0]
    rows = re.findall(r'^\| (conv\w+) .* (\d+) \| (\d+) \|$', table, re.MULTILINE)
    assert len(rows) == 6
    for name, of_cell, of_kernel in rows:
        assert (int(of_cell), int(of_kernel)) == fields[name]
