"""Test that README and manual fit the code: Python runs, what is named exists, links resolve.

A block of the language py quotes a file: whole lines, `...` for omissions. In one of the language
python the output of a line that begins with `print(` follows it as a comment. The python blocks
of a page run in order in one namespace, in a folder with the files that they open: photo.jpg, and
checkpoints of random weights. Names and options are read from the source, without importing it.
"""

import ast
import os
import pathlib
import re
import shlex
import textwrap

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import detect
from model import FEATURE_MAPS, SSD300, SSD512
from support.checkpoints import save_checkpoint
from utils import label_map

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
         for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))}
README, MANUAL = PAGES['README.md'], PAGES['docs/manual.md']
FENCED_BLOCK = re.compile(r'^( *)```(\w*)\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)
PROSE = FENCED_BLOCK.sub('', README + MANUAL)
IN_BACKTICKS = re.findall(r'`([^`\n]+)`', PROSE)

# Python files by their path in the repository, without suffix: 'train', 'tools/shapes'.
SOURCES = {path.relative_to(ROOT).with_suffix('').as_posix(): ast.parse(path.read_text('utf-8'))
           for folder in ('', 'support', 'tools') for path in (ROOT / folder).glob('*.py')}

# Names in backticks of other programs, and parts of files and messages.
OTHERS = {'ceil_mode', 'avx512_bf16'}
FILES_OF_USERS = {'trainval.txt', 'test.txt'}
TORCHRUN_OPTIONS = {'--nproc-per-node', '--nnodes', '--rdzv-backend', '--rdzv-endpoint'}


@pytest.fixture(scope='module')
def model():
    """An SSD300 of VOC's classes with random weights."""
    return SSD300(len(label_map))


def blocks(language, text):
    """Return the fenced blocks of a language, without the indentation of a list."""
    return [''.join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
            for indent, kind, body in FENCED_BLOCK.findall(text) if kind == language]


# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


def expected_output(block):
    """Return the comments that follow the `print(` lines of a block."""
    return [line.rpartition('  # ')[2].strip() for line in block.splitlines()
            if line.startswith('print(')]


@pytest.mark.parametrize(('page', 'at_least'), [('README.md', 10), ('docs/manual.md', 2)])
def test_python_blocks_print_their_comments(page, at_least, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, 'show', lambda image, *args: None)
    Image.effect_noise((120, 90), 80).convert('RGB').save('photo.jpg')
    save_checkpoint('random.pth.tar', model=model.state_dict(), label_map=label_map)
    for name in set(re.findall(r'[\w.]+\.pth\.tar', README + MANUAL)):
        os.link('random.pth.tar', name)
    detect.default_model.cache_clear()
    namespace = {}
    python = blocks('python', PAGES[page])
    assert len(python) >= at_least
    for block in python:
        exec(compile(block, page, 'exec'), namespace)
        assert capsys.readouterr().out.splitlines() == expected_output(block), block
    detect.default_model.cache_clear()


def parameters_of(source):
    """Return the command-line options of a script, from its class `Parameters`."""
    options = {'--help'}
    for node in SOURCES[source].body:
        if isinstance(node, ast.ClassDef) and node.name == 'Parameters':
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    name = field.target.id.replace('_', '-')
                    options.add(f'--{name}')
                    if ast.unparse(field.annotation) == 'bool':
                        options.add(f'--no-{name}')
    return options


def find_script(words):
    """Return index and source of the script that a command runs, or None."""
    for index, word in enumerate(words):
        if word.endswith('.py'):
            return index, word.removesuffix('.py')
        if word == '-m' and words[index + 1].startswith('tools.'):
            return index + 1, words[index + 1].replace('.', '/')
    return None


def command_lines():
    """Return the words of each command in the shell blocks, and of commands in backticks."""
    bash = [block.replace('\\\n', '') for text in PAGES.values() for block in blocks('bash', text)]
    lines = [line for block in bash for line in block.splitlines()]
    lines += [code for code in IN_BACKTICKS if code.startswith(('python ', 'make '))]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_commands_name_scripts_and_options_that_exist():
    commands = [(words, *script) for words in command_lines() if (script := find_script(words))]
    assert len(commands) > 10
    for words, index, source in commands:
        assert source in SOURCES, words
        for part, allowed in ((words[:index], TORCHRUN_OPTIONS),
                              (words[index:], parameters_of(source))):
            options = {word.partition('=')[0] for word in part if word.startswith('--')}
            assert options <= allowed, f'{words}: {options - allowed}'


def test_make_targets_exist():
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    named = {words[1] for words in command_lines() if words[0] == 'make' and len(words) > 1}
    assert named
    assert named <= targets


def find_lines(lines, source, first):
    """Return the index after the place of consecutive lines in a source, whatever the indentation.

    Args:
        lines, source: lists of lines.
        first: index to search from.
    """
    for start in range(first, len(source) - len(lines) + 1):
        there = source[start:start + len(lines)]
        if textwrap.dedent('\n'.join(there)) == textwrap.dedent('\n'.join(lines)):
            return start + len(lines)
    raise AssertionError(f'not in the source from line {first + 1} on: {lines}')


def test_quotes_are_the_source():
    quotes = blocks('py', README)
    assert len(quotes) > 10
    for quote in quotes:
        heading, _, body = quote.partition('\n')
        name, function = re.fullmatch(r'# (\w+\.py)(?:, ([\w.]+)\(\))?', heading).groups()
        source = (ROOT / name).read_text('utf-8').splitlines()
        place = 0
        if function:
            assert function in defined_names(), function
            place = source.index(next(line for line in source if line.lstrip().startswith(
                f'def {function.rpartition(".")[2]}(')))
            if '.' in function:     # of several forward(), that of the class
                place = source.index(next(line for line in source if line.startswith(
                    f'class {function.partition(".")[0]}(')))
        for part in re.split(r'^ *\.\.\.\n', body, flags=re.MULTILINE):
            place = find_lines(part.splitlines(), source, place)


# --------------------------------------------------------------------------------------------------
# Names in backticks
# --------------------------------------------------------------------------------------------------


def defined_names():
    """Return functions and classes: `train`, `train.train`, `SSD300`, `SSD300.forward`, ..."""
    names = set()
    for source, tree in SOURCES.items():
        module = source.rpartition('/')[2]
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names |= {node.name, f'{module}.{node.name}'}
            if isinstance(node, ast.ClassDef):
                methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef)]
                names |= {f'{node.name}.{method}' for method in methods} | set(methods)
    return names


def all_identifiers():
    """Return every identifier of the source: variables, attributes, arguments, fields, modules."""
    names = {source.rpartition('/')[2] for source in SOURCES}
    for node in (node for tree in SOURCES.values() for node in ast.walk(tree)):
        for field in ('id', 'attr', 'arg', 'name'):
            names.add(getattr(node, field, None))
    return names


def test_names_in_backticks_exist():
    defined = defined_names()
    known = defined | all_identifiers() | OTHERS
    n_checked = 0
    for code in IN_BACKTICKS:
        call = re.fullmatch(r'([A-Za-z_][\w.]*)\(.*\)', code)
        if re.fullmatch(r'[\w/]+\.(py|md|txt)', code):
            exists = code in FILES_OF_USERS or (ROOT / code).is_file()
        elif call:
            exists = call[1] in defined
        elif re.fullmatch(r'[A-Za-z_]\w*\.[a-z_]+', code) and code.split('.')[0] in defined:
            exists = code in defined
        elif re.fullmatch(r'[a-z]+(_[a-z0-9]+)+|[A-Z][a-z]+[A-Z]\w+|[A-Z]+_[A-Z_]+', code):
            exists = code in known
        else:
            continue
        assert exists, code
        n_checked += 1
    assert n_checked > 50


def test_options_in_backticks_exist():
    options = TORCHRUN_OPTIONS.union(*(parameters_of(source) for source in SOURCES))
    named = {option for code in IN_BACKTICKS if not code.startswith(('tensorboard', 'docker'))
             for option in re.findall(r'(?<!\S)--[a-z][\w-]*', code)}
    assert named
    assert named <= options


def test_names_are_in_the_file_given_with_them():
    # "`evaluate()` in `eval.py`"
    places = re.findall(r'`(\w+)(?:\(\))?`\s+in\s+`(\w+)\.py`', PROSE)
    assert places
    for name, source in places:
        top_level = {getattr(target, 'id', None) for node in SOURCES[source].body
                     if isinstance(node, ast.Assign) for target in node.targets}
        top_level |= {getattr(node, 'name', None) for node in SOURCES[source].body}
        assert name in top_level, f'{name} in {source}.py'


# --------------------------------------------------------------------------------------------------
# Links, pictures, tables
# --------------------------------------------------------------------------------------------------


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r'^#{1,6} (.+)$', FENCED_BLOCK.sub('', PAGES[page]), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_resolve(page):
    for link in re.findall(r'(?<!!)\[[^]]+\]\(([^)\s]+)\)', FENCED_BLOCK.sub('', PAGES[page])):
        if link.startswith('https://'):
            continue
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


def test_the_manual_is_linked_and_every_page_of_docs_is_reachable():
    linked = set(re.findall(r'\]\((docs/\w+\.md)[#)]', README))
    assert linked >= set(PAGES) - {'README.md'}


@pytest.mark.parametrize('page', PAGES)
def test_pictures_exist_for_light_and_dark_and_have_an_alternative_text(page):
    content = FENCED_BLOCK.sub('', PAGES[page])
    pictures = re.findall(r'!\[([^]]*)\]\(([^)\s]+)\)', content)
    pictures += re.findall(r'<img alt="([^"]*)" src="([^"]+)">', content)
    dark = re.findall(r'<source media="\(prefers-color-scheme:dark\)" srcset="([^"]+)">', content)
    if page == 'README.md':
        assert len(dark) == len(pictures) - 1   # all but the photos at the top
    for text, path in [*pictures, *(('', path) for path in dark)]:
        assert path in dark or len(text) > 20, path
        with Image.open((ROOT / page).parent / path) as picture:
            picture.verify()


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def test_the_tutorial_is_read_in_an_evening():
    assert len(README.split()) <= 6500


def test_lines_of_the_files_are_about_right():
    rows = re.findall(r'^\| (`\w+\.py`.*) \| .* \| (\d+) \|$', README, re.MULTILINE)
    assert len(rows) == 6
    for files, lines in rows:
        n_lines = sum(len((ROOT / name).read_text('utf-8').splitlines())
                      for name in re.findall(r'`([^`]+)`', files))
        assert abs(int(lines) - n_lines) < 0.05 * n_lines, f'{files}: {n_lines} lines'


def test_numbers_in_sentences():
    text = ' '.join(README.split())
    table = re.findall(r'^\w+ +0[\d.]+ +0[\d.]+ +(\d+) +\d+ +\d+ +(0[\d.]+)$', MANUAL,
                       re.MULTILINE)
    n_objects = sum(int(objects) for objects, _ in table)
    n_detected = sum(int(objects) * float(recall) for objects, recall in table)
    assert n_objects == 484
    assert f'finds {100 * n_detected / n_objects:.0f} % of the objects' in text

    maps = {feature_map.name: feature_map for feature_map in FEATURE_MAPS}
    for ratio, words in ((3, '{} and {} of its 300 pixels'), (2, 'too long, {} and {}:')):
        assert words.format(*(round(300 * maps[name].scale * ratio ** 0.5)
                              for name in ('conv10_2', 'conv11_2'))) in text
    assert f'add {2 * maps["conv4_3"].size ** 2:,} priors' in text

    flop = []
    for network in (SSD512, SSD300):
        with torch.device('meta'), FlopCounterMode(display=False) as counter:
            network(21)(torch.zeros(1, 3, network.input_size, network.input_size))
        flop.append(counter.get_total_flops() / 1e9)
    assert f'{flop[0]:.0f} GFLOP instead of {flop[1]:.1f}' in text


def test_receptive_fields_are_those_of_the_layers(model):
    field, step, fields = 1, 1, {}
    for name, layer in (*model.base.named_children(), *model.aux_convs.named_children()):
        kernel, stride, dilation = (
            value[0] if isinstance(value, tuple) else value
            for value in (layer.kernel_size, layer.stride, layer.dilation))
        field += (kernel - 1) * dilation * step
        step *= stride
        if isinstance(layer, nn.Conv2d):
            fields[name] = field, field + 2 * step      # of a cell, and of a 3x3 kernel on it
    table = README.partition('receptive field |')[2].partition('\n\n')[0]
    rows = re.findall(r'^\| (conv\w+) \| (\d+) \| (\d+) \|$', table, re.MULTILINE)
    assert len(rows) == len(FEATURE_MAPS)
    for name, of_cell, of_kernel in rows:
        assert (int(of_cell), int(of_kernel)) == fields[name]
