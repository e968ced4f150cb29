"""Runs of train.py as processes: killed, torn apart, and in two."""

import csv
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from test_train import assert_same

from create_data_lists import Parameters as ListParameters, main as make_lists
from model import SSD300
from utils import load_checkpoint, save_checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
# How often a run is killed. SSD_KILLS=20 is the thorough version.
KILLS = int(os.environ.get('SSD_KILLS', 1))


@pytest.fixture
def folder(make_voc, tmp_path):
    """A folder with a data folder `lists`: seven images to train on, three to test on."""
    images = {f'im{i}': [('cat', (5, 5, 30, 30)), ('dog', (20, 10, 60, 45))][:1 + i % 2]
              for i in range(7)}
    tests = {f't{i}': [('cat', (5 + i, 5, 30, 30 + i))] for i in range(3)}
    voc = make_voc({'train': images, 'test': tests})
    for i, path in enumerate(sorted((voc / 'JPEGImages').iterdir())):
        noise = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.byte().numpy()).save(path)
    make_lists(ListParameters(train=(f'{voc}:train',), test=(f'{voc}:test',),
                              output_folder=str(tmp_path / 'lists')))
    return tmp_path


def command(*words, processes=1, script='train.py'):
    """The words of a command that trains at toy size, or of another script."""
    start = [sys.executable]
    if processes > 1:
        start += ['-m', 'torch.distributed.run', '--nproc-per-node', processes, '--master-port',
                  random.randint(20_000, 60_000)]
    train = ['--no-pretrained', '--batch-size', 4, '--decay-lr-at', 3, '--warmup', 2,
             '--precision', 'float32', '--print-freq', 1]
    return [str(word) for word in (
        *start, ROOT / script, '--data-folder', 'lists', '--device', 'cpu', '--workers', 1,
        *(train if script == 'train.py' else ()), *words)]


def start(words, folder):
    """Start a command in a folder; its output goes to the file `output` there."""
    with open(folder / 'output', 'wb') as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                                env={**os.environ, 'OMP_NUM_THREADS': '1'})


def finish(process, folder, code=0, timeout=120):
    """Wait for a process to end; returns its output."""
    try:
        assert process.wait(timeout) == code, (folder / 'output').read_text()[-3000:]
    finally:
        process.kill()
    return (folder / 'output').read_text()


def run(*words, folder, code=0, **options):
    """Run a command to its end; returns its output."""
    return finish(start(command(*words, **options), folder), folder, code)


def test_killed_at_random_moments_a_run_ends_as_if_it_were_not(folder):
    """The checkpoint is written all the time, so kills come in the middle of that, too."""
    words = ('--iterations', 5, '--save-every', 1, '--eval-every', 4)
    run(*words, '--checkpoint', 'whole.pth.tar', folder=folder)
    words = command(*words, '--checkpoint', 'killed.pth.tar', '--resume', 'auto')
    dice, kills, done = random.Random(0), 0, -1
    while kills < KILLS:
        process = start(words, folder)
        # Iterations begin when the bar appears; until then there is nothing to disturb.
        while process.poll() is None and 'it/s' not in (folder / 'output').read_text():
            time.sleep(0.05)
        time.sleep(dice.uniform(0.3, 3))
        if process.poll() is not None:  # it had little left to do: kill a longer one
            (folder / 'killed.pth.tar').unlink()
            (folder / 'killed.best.pth.tar').unlink()
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if (folder / 'killed.pth.tar').exists():
            before, done = done, load_checkpoint(folder / 'killed.pth.tar')['iteration']
            assert done >= before or before == 5, 'what was saved is not lost'
    finish(start(words, folder), folder)
    whole, killed = (load_checkpoint(folder / f'{name}.pth.tar') for name in ('whole', 'killed'))
    assert whole['iteration'] == killed['iteration'] == 5
    assert_same(whole['model'], killed['model'])
    assert_same(whole['optimizer'], killed['optimizer'])
    assert not list(folder.glob('.killed*')), 'torn files are removed'
    logs = [read_log(folder / f'{name}_log') for name in ('whole', 'killed')]
    assert [row['iteration'] for row in logs[0]] == [str(i) for i in range(1, 6)]
    for rows in zip(*logs, strict=True):
        for column in ('iteration', 'loss', 'classes', 'boxes', 'rate', 'mAP', 'skipped'):
            assert rows[0][column] == rows[1][column], column


def read_log(folder):
    """The rows of a `log.csv`."""
    with open(folder / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_killed_while_it_writes_a_checkpoint_a_run_has_the_one_before(folder):
    """The process is stopped in the middle of the file, where the file system has half of it."""
    code = '''
import os, signal, sys, torch
import train, tyro
save = torch.save
def torn(state, file):
    if state['iteration'] == 2:
        save(state, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = torn
train.main(tyro.cli(train.Parameters))
'''
    words = command('--iterations', 3, '--save-every', 1, '--eval-every', 0, '--checkpoint',
                    'c.pth')
    torn = [words[0], '-c', code, *words[2:]]
    process = subprocess.Popen(torn, cwd=folder, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert process.wait(100) == -signal.SIGKILL
    assert load_checkpoint(folder / 'c.pth')['iteration'] == 1
    left, = folder.glob('.c.*.pth')
    assert left.stat().st_size > 50e6
    output = finish(start([*words, '--resume', 'auto'], folder), folder)
    assert 'iterations 1 to 3 ' in output and load_checkpoint(folder / 'c.pth')['iteration'] == 3
    assert not list(folder.glob('.c.*'))


def test_auto_passes_over_what_is_torn_and_begins_where_there_is_nothing(folder):
    out = run('--iterations', 2, '--eval-every', 2, '--resume', 'auto', '--checkpoint', 'c.pth',
              folder=folder)
    assert 'iterations 0 to 2 ' in out
    last, best = folder / 'c.pth', folder / 'c.best.pth'
    older = load_checkpoint(best)
    save_checkpoint(best, **{**older, 'iteration': 1})
    last.write_bytes(last.read_bytes()[:1_000_000])
    out = run('--iterations', 3, '--eval-every', 0, '--resume', 'auto', '--checkpoint', 'c.pth',
              folder=folder)
    assert 'note: c.pth cannot be read as a checkpoint' in out and 'iterations 1 to 3 ' in out


def test_an_evaluation_that_was_killed_is_made_up_for(folder):
    """Killed in the last evaluation, after the last checkpoint; then the same command again."""
    words = ('--iterations', 2, '--print-freq', 2, '--resume', 'auto', '--checkpoint', 'c.pth')
    process = start(command(*words), folder)
    try:
        while not (folder / 'c.pth').exists():
            assert process.poll() is None, (folder / 'output').read_text()[-2000:]
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not any(row['mAP'] for row in read_log(folder / 'c_log'))
    for _ in range(2):  # once more, as a queue of jobs may do, it has nothing left to do
        out = run(*words, folder=folder)
        assert 'iterations 2 to 2 ' in out and '2 iterations, written to c.pth' in out
        rows = read_log(folder / 'c_log')
        assert [row['iteration'] for row in rows] == ['2'] and float(rows[0]['mAP']) >= 0
    assert '2 iterations: mAP' not in out and (folder / 'c.best.pth').exists()


def test_log_curves_and_tensorboard_have_the_numbers_of_the_bar(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out = run('--iterations', 4, '--eval-every', 2, '--print-freq', 2, '--checkpoint', 'c.pth.tar',
              folder=folder)
    rows = read_log(folder / 'c_log')
    assert [row['iteration'] for row in rows] == ['2', '4']
    for row in rows:
        shown = (f'loss {float(row["loss"]):.3f} = classes {float(row["classes"]):.3f} + boxes '
                 f'{float(row["boxes"]):.3f}, lr {float(row["rate"]):.2g}')
        assert shown in out
        mAP = float(row['mAP'])
        assert f'{row["iteration"]} iterations: mAP {mAP:.4f}' in out
    board = EventAccumulator(str(folder / 'c_log')).Reload()
    for column in ('loss', 'classes', 'boxes', 'rate', 'images_per_s', 'mAP'):
        events = board.Scalars(column)
        assert [event.step for event in events] == [2, 4]
        assert [event.value for event in events] == pytest.approx(
            [float(row[column]) for row in rows], rel=1e-5)
    assert len(board.Tags()['images']) == 3
    assert (folder / 'c_log' / 'curves.png').stat().st_size > 10_000
    assert {'c.pth.tar', 'c.best.pth.tar'} <= {path.name for path in folder.iterdir()}


# --- two processes ---


def test_two_processes_train_and_evaluate_as_one(folder):
    # Without augmentation there is no flat filler, on which equal losses make a toss-up of which
    # negatives are the hard ones.
    words = ('--iterations', 3, '--eval-every', 0, '--no-augment', '--lr', 1e-4)
    run(*words, '--checkpoint', 'one.pth', folder=folder)
    out = run(*words, '--checkpoint', 'two.pth', '--grad-accumulation', 2, folder=folder,
              processes=2)
    assert 'cpu x 2 processes' in out and out.count('3 iterations, written to two.pth') == 1
    one, two = (load_checkpoint(folder / f'{name}.pth') for name in ('one', 'two'))
    for name, weights in one['model'].items():
        assert torch.allclose(weights, two['model'][name], rtol=0, atol=1e-5), name
    torch.manual_seed(0)
    assert (one['model']['base.conv7.weight'] - SSD300(3).base.conv7.weight).abs().max() > 1e-4
    logs = [read_log(folder / f'{name}_log') for name in ('one', 'two')]
    for rows in zip(*logs, strict=True):
        for column in ('iteration', 'loss', 'classes', 'boxes', 'rate'):
            assert float(rows[0][column]) == pytest.approx(float(rows[1][column]), rel=1e-3)

    tables = [re.findall(r'^(?:cat|dog|mAP) .*$', run(
        '--checkpoint', 'two.pth', '--batch-size', 1, folder=folder, script='eval.py',
        processes=n), re.MULTILINE) for n in (1, 2)]
    assert len(tables[0]) == 3 and tables[0] == tables[1]


def test_a_process_that_dies_ends_the_run(folder):
    process = start(command('--iterations', 10_000, '--checkpoint', 'c.pth', processes=2), folder)
    try:
        while ' 3/10000' not in (folder / 'output').read_text():
            assert process.poll() is None, (folder / 'output').read_text()[-2000:]
            time.sleep(0.1)
        ranks = {}
        for path in pathlib.Path('/proc').glob('[0-9]*'):
            if f'PPid:\t{process.pid}\n' in (path / 'status').read_text():
                ranks[re.search(r'\0RANK=(\d)', (path / 'environ').read_text())[1]] = int(path.name)
        os.kill(ranks['1'], signal.SIGKILL)
    except BaseException:
        process.kill()
        raise
    out = finish(process, folder, code=1, timeout=60)
    assert 'train.py: the other processes of this run cannot be reached' in out
    assert '--resume auto' in out


def test_slip_of_one_process_is_told(folder):
    lists = json.loads((folder / 'lists' / 'TRAIN_images.json').read_text())
    for path in lists:
        pathlib.Path(path).write_bytes(b'no image')
    out = run('--iterations', 3, '--checkpoint', 'c.pth', folder=folder, code=1, processes=2)
    assert 'JPEGImages/im' in out and 'cannot be decoded' in out
