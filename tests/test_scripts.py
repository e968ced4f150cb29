"""The real scripts, as processes, one after the other as a person types them."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*words, folder, code=0):
    """Run a script in a folder; returns what it printed, both streams."""
    script, *arguments = map(str, words)
    done = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)
    assert done.returncode == code, done.stdout[-2000:]
    assert 'Traceback' not in done.stdout
    return done.stdout


def test_from_drawn_shapes_to_drawn_boxes(tmp_path):
    run('shapes.py', '--output-folder', 'shapes', '--n-train', 6, '--n-test', 3, folder=tmp_path)
    out = run('create_data_lists.py', '--train', 'shapes:trainval', '--test', 'shapes:test',
              '--output-folder', 'lists', folder=tmp_path)
    assert 'TRAIN: 6 images' in out and 'TEST: 3 images' in out
    names = set(json.loads((tmp_path / 'lists' / 'label_map.json').read_text())) - {'background'}

    common = ('--data-folder', 'lists', '--no-pretrained', '--batch-size', 2, '--workers', 1,
              '--device', 'cpu', '--decay-lr-at', 2)
    out = run('train.py', *common, '--iterations', 1, folder=tmp_path)
    assert '1 iterations, written to ./checkpoint_ssd300.pth.tar' in out
    out = run('train.py', *common, '--iterations', 2, '--resume', 'checkpoint_ssd300.pth.tar',
              folder=tmp_path)
    assert 'iterations 1 to 2' in out and re.search(r'loss [\d.]+ = classes [\d.]+ \+ boxes', out)

    out = run('eval.py', '--data-folder', 'lists', '--batch-size', 2, '--workers', 1, '--device',
              'cpu', folder=tmp_path)
    assert re.search(r'^mAP +\d\.\d{4}$', out, re.MULTILINE)
    assert all(re.search(rf'^{name} +(\d\.\d{{4}}|no objects)', out, re.M) for name in names)

    photo = tmp_path / 'shapes' / 'JPEGImages' / '000007.jpg'
    before = photo.read_bytes()
    run('detect.py', photo, '--output', 'annotated.png', '--min-score', 0, '--top-k', 5,
        folder=tmp_path)
    assert photo.read_bytes() == before
    with Image.open(tmp_path / 'annotated.png') as annotated, Image.open(photo) as original:
        assert annotated.size == original.size and annotated.mode == 'RGB'
        assert annotated.tobytes() != original.tobytes()


def test_same_seed_draws_the_same_shapes_with_what_they_promise(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        run('shapes.py', '--output-folder', name, '--n-train', 40, '--n-test', 10, '--seed', seed,
            folder=tmp_path)
    files = sorted(path.relative_to(tmp_path / 'a') for path in (tmp_path / 'a').rglob('*.*'))
    assert len(files) == 2 * 50 + 2
    same = [(tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes() for f in files]
    other = [(tmp_path / 'a' / f).read_bytes() == (tmp_path / 'c' / f).read_bytes() for f in files]
    assert all(same) and not all(other)
    annotations = ''.join(path.read_text() for path in (tmp_path / 'a' / 'Annotations').iterdir())
    names = re.findall('<name>(.*)</name>', annotations)
    assert len(set(names)) >= 3 and len(names) > 50
    assert '<difficult>1</difficult>' in annotations and '<difficult>0</difficult>' in annotations


@pytest.mark.parametrize('words, expected', [
    (['create_data_lists.py', '--voc07-path', 'nowhere'],
     ['nowhere', 'not a folder in VOC layout']),
    (['create_data_lists.py', '--train', 'nosplit'], ["'nosplit' is not folder:split"]),
    (['train.py', '--data-folder', 'nowhere'], ['nowhere', 'create_data_lists.py']),
    (['eval.py', '--checkpoint', 'nowhere.pth'], ['nowhere.pth', 'train.py']),
    (['detect.py', 'photo.jpg', '--checkpoint', 'not_one.pth'], ['not_one.pth']),
])
def test_a_slip_is_one_line_and_exit_status_1(tmp_path, words, expected):
    (tmp_path / 'not_one.pth').write_bytes(b'something else')
    lines = run(*words, folder=tmp_path, code=1).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(words[0])
    assert all(part in lines[0] for part in expected)


@pytest.mark.parametrize('script', ['create_data_lists.py', 'train.py', 'eval.py', 'detect.py',
                                    'shapes.py'])
def test_help_shows_the_comments_of_the_parameters(script, tmp_path):
    out = run(script, '--help', folder=tmp_path)
    options = re.findall(r'--[a-z][a-z0-9-]+', out)
    assert len(set(options)) >= 4
    source = (ROOT / script).read_text()
    for option in set(options) - {'--help'}:
        name = option.removeprefix('--').removeprefix('no-').replace('-', '_')
        assert re.search(rf'^    # .+\n    {name}: ', source, re.MULTILINE) or name not in source
    assert list(tmp_path.iterdir()) == []


def test_importing_does_nothing(tmp_path):
    code = ('import utils, model, datasets, create_data_lists, train, eval, detect, shapes, random;'
            'print(random.getstate() is not None)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, text=True, timeout=120,
                          capture_output=True, env={'PYTHONPATH': str(ROOT), 'PATH': ''})
    assert (done.returncode, done.stdout, done.stderr) == (0, 'True\n', '')
    assert list(tmp_path.iterdir()) == []


def test_benchmark_prints_a_table_and_writes_it_as_json(tmp_path):
    out = run('benchmark.py', '--only', 'loss', 'detect', '--repeats', 1, '--output', 'out.json',
              '--device', 'cpu', folder=tmp_path)
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert {row['what'].split(',')[0] for row in rows} == {'loss', 'detect'}
    for row in rows:
        assert row['ours'] > 0 and row['torchvision'] > 0 and row['ratio'] > 0
        assert row['what'] in out
