"""Tests of all scripts together: from drawing a data set to an annotated image, and their imports.

What a test of one script covers is in that script's file.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ['create_data_lists.py', 'train.py', 'eval.py', 'detect.py']
TOOLS = sorted(f'tools/{path.name}' for path in (ROOT / 'tools').glob('*.py')
               if "'__main__'" in path.read_text())


def start(*words, folder):
    """Run Python in another process with a folder as the working one; returns its output."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, text=True, timeout=240,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stdout[-2000:]
    assert 'Traceback' not in done.stdout
    return done.stdout


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Return a function that runs a script within this process, to its exit status and output."""
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        output, status = io.StringIO(), 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                runpy.run_path(str(ROOT / script), run_name='__main__')
            except SystemExit as end:
                status = end.code or 0
        return status, output.getvalue()
    return run


def test_from_drawing_shapes_to_detecting_them(tmp_path, call):
    status, out = call('tools/shapes.py', '--output-folder', 'shapes', '--n-train', 4, '--n-test',
                       2)
    assert status == 0 and '6 images drawn in shapes' in out
    status, out = call('create_data_lists.py', '--train', 'shapes:trainval', '--test',
                       'shapes:test', '--output-folder', 'lists')
    assert status == 0 and 'TRAIN: 4 images' in out and 'TEST: 2 images' in out
    names = set(json.loads((tmp_path / 'lists' / 'label_map.json').read_text())) - {'background'}

    common = (ROOT / 'train.py', '--data-folder', 'lists', '--no-pretrained', '--batch-size', 1,
              '--workers', 1, '--device', 'cpu', '--precision', 'float32', '--decay-lr-at', 2,
              '--eval-every', 0)
    out = start(*common, '--iterations', 1, folder=tmp_path)
    assert '1 iterations, written to ./checkpoint_ssd300.pth.tar' in out
    out = start(*common, '--iterations', 2, '--resume', 'checkpoint_ssd300.pth.tar',
                folder=tmp_path)
    assert 'iterations 1 to 2' in out
    assert re.search(r'loss [\d.]+ = [a-z ]+ [\d.]+ \+ [a-z ]+ [\d.]+', out)

    out = start(ROOT / 'eval.py', '--data-folder', 'lists', '--batch-size', 2, '--workers', 1,
                '--device', 'cpu', folder=tmp_path)
    assert re.search(r'^mAP +\d\.\d{4}$', out, re.MULTILINE)
    assert all(re.search(rf'^{name} +(\d\.\d{{4}}|no objects)', out, re.M) for name in names)

    photo = tmp_path / 'shapes' / 'JPEGImages' / '000005.jpg'
    before = photo.read_bytes()
    start(ROOT / 'detect.py', photo, '--output', 'annotated.png', '--min-score', 0, '--top-k', 5,
          '--device', 'cpu', folder=tmp_path)
    assert photo.read_bytes() == before
    with Image.open(tmp_path / 'annotated.png') as annotated, Image.open(photo) as original:
        assert annotated.size == original.size and annotated.mode == 'RGB'
        assert annotated.tobytes() != original.tobytes()


def test_same_seed_draws_the_same_files_of_varied_shapes(tmp_path, call):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        status, _ = call('tools/shapes.py', '--output-folder', name, '--n-train', 40, '--n-test',
                         10, '--seed', seed)
        assert status == 0
    files = sorted(path.relative_to(tmp_path / 'a') for path in (tmp_path / 'a').rglob('*.*'))
    assert len(files) == 2 * 50 + 2
    content = {name: [(tmp_path / name / file).read_bytes() for file in files] for name in 'abc'}
    assert content['a'] == content['b'] and content['a'] != content['c']
    annotations = ''.join(path.read_text() for path in (tmp_path / 'a' / 'Annotations').iterdir())
    names = re.findall('<name>(.*)</name>', annotations)
    assert len(set(names)) >= 3 and len(names) > 50
    assert '<difficult>1</difficult>' in annotations and '<difficult>0</difficult>' in annotations


@pytest.mark.parametrize('words, expected', [
    (['create_data_lists.py', '--voc07-path', 'nowhere'],
     ['nowhere', 'not a folder in VOC layout']),
    (['create_data_lists.py', '--train', 'nosplit'], ["'nosplit' is not folder:split"]),
    (['train.py', '--data-folder', 'nowhere', '--device', 'cpu'],
     ['nowhere', 'create_data_lists.py']),
    (['eval.py', '--checkpoint', 'nowhere.pth'], ['nowhere.pth', 'train.py']),
    (['detect.py', 'photo.jpg', '--checkpoint', 'not_one.pth'], ['not_one.pth']),
])
def test_user_error_is_one_line_and_exit_status_1(tmp_path, call, words, expected):
    (tmp_path / 'not_one.pth').write_bytes(b'something else')
    status, output = call(*words)
    lines = output.strip().splitlines()
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith(words[0])
    assert all(part in lines[0] for part in expected)


@pytest.mark.parametrize('script', [*SCRIPTS, *TOOLS])
def test_help_shows_the_comments_of_the_parameters(script, tmp_path, call, monkeypatch):
    monkeypatch.setenv('COLUMNS', '1000')   # each comment on one line
    status, out = call(script, '--help')
    assert status == 0
    options = set(re.findall(r'--[a-z][a-z0-9-]+', out)) - {'--help'}
    n_least = 1 if script == 'tools/priors.py' else 2   # that has one parameter
    assert len(options) >= n_least
    comments = re.findall(r'^    # (?!---)(.+)\n    ([a-z]\w*): ', (ROOT / script).read_text(),
                          re.MULTILINE)
    described = {f'--{name.replace("_", "-")}' for _, name in comments}
    assert len(described & options) >= n_least
    for option in options:
        name = option.removeprefix('--').removeprefix('no-')
        assert {option, f'--{name}'} & described or name.replace('-', '_') not in (
            ROOT / script).read_text(), f'{option} has no comment'
    words = ' '.join(re.sub('[^ -~]', ' ', out).split())
    for last_line, name in comments:
        if f'--{name.replace("_", "-")}' in options:
            assert last_line.split('. ')[-1].strip()[:40] in words, name
    assert list(tmp_path.iterdir()) == []


def test_root_holds_the_seven_files_of_the_tutorial():
    assert sorted(path.name for path in ROOT.glob('*.py')) == [
        'create_data_lists.py', 'datasets.py', 'detect.py', 'eval.py', 'model.py', 'train.py',
        'utils.py']


IMPORTS = '''
import importlib, json, pathlib, random, sys, warnings
state, loaded = random.getstate(), {}
import train
slow = 'av', 'pycocotools', 'matplotlib', 'onnx', 'onnxruntime'
loaded['train'] = [name for name in slow if name in sys.modules]
root = pathlib.Path(train.__file__).parent
for path in sorted([*root.glob('*.py'), *root.glob('support/*.py'), *root.glob('tools/*.py')]):
    name = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')
    importlib.import_module(name)
    loaded[name] = loaded.get(name, [])
import torch
print(json.dumps([loaded, random.getstate() == state, torch.cuda.is_initialized()]))
'''


def test_importing_does_nothing_and_train_loads_no_slow_library(tmp_path):
    done = subprocess.run([sys.executable, '-c', IMPORTS], cwd=tmp_path, text=True, timeout=120,
                          capture_output=True, env={'PYTHONPATH': str(ROOT), 'PATH': ''})
    assert (done.returncode, done.stderr) == (0, '')
    loaded, is_random_state_unchanged, is_gpu_initialized = json.loads(done.stdout)
    assert loaded['train'] == []
    assert {'utils', 'model', 'datasets', 'create_data_lists', 'train', 'eval', 'detect',
            'support.errors', 'support.video', 'tools.shapes', 'tools.benchmark'} <= set(loaded)
    assert is_random_state_unchanged and not is_gpu_initialized
    assert list(tmp_path.iterdir()) == []
