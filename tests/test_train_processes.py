"""Runs of train.py as processes: killed, interrupted while writing, and with two ranks.

They train the thin network of `tests/thin.py`.
"""

import contextlib
import csv
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from create_data_lists import Parameters as ListParameters, main as make_lists
from support.checkpoints import load_checkpoint, save_checkpoint
from thin import ThinSSD300

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


def command(*words, ranks=1, script='train.py'):
    """Return the command that trains a thin network, or that of another script."""
    start = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = free.getsockname()[1]
        start += ['-m', 'torch.distributed.run', '--nproc-per-node', ranks, '--master-port', port]
    settings = ['--no-pretrained', '--batch-size', 2, '--decay-lr-at', 3, '--warmup', 2,
                '--precision', 'float32', '--print-freq', 1]
    return [str(word) for word in (
        *start, ROOT / 'tests' / 'thin.py', script, '--data-folder', 'lists', '--device', 'cpu',
        '--workers', 1, *(settings if script == 'train.py' else ()), *words)]


def start(words, folder):
    """Start a command in a folder; its output goes to the file `output` there."""
    with open(folder / 'output', 'wb') as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                                env={**os.environ, 'OMP_NUM_THREADS': '1',
                                     'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})


def kill(process):
    """Kill a process and those that it has started: the ranks of torchrun would outlast it."""
    for pid in child_processes(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()


def finish(process, folder, code=0, timeout=300 * KILLS):
    """Wait for a process to end; returns its output."""
    try:
        assert process.wait(timeout) == code, (folder / 'output').read_text()[-3000:]
    finally:
        kill(process)
    return (folder / 'output').read_text()


def run(*words, folder, code=0, **options):
    """Run a command to its end; returns its output."""
    return finish(start(command(*words, **options), folder), folder, code)


def wait_for(condition, process, folder, timeout=300):
    """Wait until a condition holds for a running process, which is killed if it never does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill(process)
            raise AssertionError((folder / 'output').read_text()[-2000:])
        time.sleep(0.02)


def child_processes(pid):
    """Return the numbers of the processes that a process has started."""
    return [int(child) for path in pathlib.Path(f'/proc/{pid}/task').glob('*/children')
            for child in path.read_text().split()]


def rank_1(process):
    """Return the number of rank 1 of a torchrun."""
    pid, = (pid for pid in child_processes(process.pid)
            if '\0RANK=1\0' in pathlib.Path(f'/proc/{pid}/environ').read_text())
    return pid


def read_log(folder):
    """Return the rows of a `log.csv` as dictionaries of strings."""
    with open(folder / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))


def assert_equal_checkpoints(a, b):
    """Assert that weights and optimizers are equal in every bit."""
    assert a['iteration'] == b['iteration'] and a['model'].keys() == b['model'].keys()
    assert all(torch.equal(weights, b['model'][name]) for name, weights in a['model'].items())
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    for key, state in a['optimizer']['state'].items():
        for name, value in state.items():
            assert torch.equal(value, b['optimizer']['state'][key][name])


# --- interrupted runs ---


def test_killed_run_ends_as_an_uninterrupted_one(folder):
    """Checkpoints are written all the time, so a run is also killed while it writes one.

    The uninterrupted run's log, TensorBoard events, curves and output are compared, too.
    """
    words = ('--iterations', 12, '--save-every', 1, '--eval-every', 8)
    out = run(*words, '--checkpoint', 'whole.pth.tar', folder=folder)
    words = command(*words, '--checkpoint', 'killed.pth.tar', '--resume', 'auto')
    rng, kills, done = random.Random(0), 0, -1
    while kills < KILLS:
        process = start(words, folder)
        # Iterations begin when the bar appears; until then there is nothing to disturb.
        while process.poll() is None and 'it/s' not in (folder / 'output').read_text():
            time.sleep(0.05)
        time.sleep(rng.uniform(0.1, 2))
        if process.poll() is not None:  # it had little left to do: kill a longer one
            (folder / 'killed.pth.tar').unlink()
            (folder / 'killed.best.pth.tar').unlink()
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if (folder / 'killed.pth.tar').exists():
            before, done = done, load_checkpoint(folder / 'killed.pth.tar')['iteration']
            assert done >= before or before == 12, 'what was saved is not lost'
    finish(start(words, folder), folder)
    whole, killed = (load_checkpoint(folder / f'{name}.pth.tar') for name in ('whole', 'killed'))
    assert whole['iteration'] == 12
    assert_equal_checkpoints(whole, killed)
    assert not list(folder.glob('.killed*')), 'temporary files are removed'
    rows, killed_rows = (read_log(folder / f'{name}_log') for name in ('whole', 'killed'))
    assert [row['iteration'] for row in rows] == [str(i) for i in range(1, 13)]
    for row, killed_row in zip(rows, killed_rows, strict=True):
        for column in ('iteration', 'loss', 'classes', 'boxes', 'rate', 'mAP', 'skipped'):
            assert row[column] == killed_row[column], column

    assert_log_is_shown_everywhere(rows, folder / 'whole_log', out)
    assert {'whole.pth.tar', 'whole.best.pth.tar'} <= {path.name for path in folder.iterdir()}


def assert_log_is_shown_everywhere(rows, log_folder, out):
    """Assert that progress bar, TensorBoard and curves show the rows of `log.csv`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    shown = [[float(number) for number in numbers] for numbers in re.findall(
        r'loss (\S+) = classes (\S+) \+ boxes (\S+), lr (\S+),', out)]
    for row in rows:    # rounded to three decimals
        numbers = [float(row[column]) for column in ('loss', 'classes', 'boxes', 'rate')]
        assert any(numbers == pytest.approx(others, abs=1e-3) for others in shown), row
    evaluated = [row for row in rows if row['mAP']]
    assert [row['iteration'] for row in evaluated] == ['8', '12']
    for row in evaluated:
        assert f'{row["iteration"]} iterations: mAP {float(row["mAP"]):.4f}' in out
    board = EventAccumulator(str(log_folder)).Reload()
    for column in ('loss', 'classes', 'boxes', 'rate', 'images_per_s', 'mAP'):
        events = board.Scalars(column)
        numbers = [(int(row['iteration']), float(row[column])) for row in rows if row[column]]
        assert [event.step for event in events] == [iteration for iteration, _ in numbers]
        assert [event.value for event in events] == pytest.approx(
            [number for _, number in numbers], rel=1e-5)
    assert len(board.Tags()['images']) == 3
    assert (log_folder / 'curves.png').stat().st_size > 10_000


def test_run_killed_in_the_middle_of_a_checkpoint_resumes_from_the_previous_one(folder):
    code = """
import os, signal, torch
import model, thin
model.SSD300 = thin.ThinSSD300
import train, tyro
save = torch.save
def save_half(state, file):
    save(state, file)
    if state['iteration'] == 2:
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
train.main(tyro.cli(train.Parameters))
"""
    words = command('--iterations', 2, '--save-every', 1, '--eval-every', 0, '--checkpoint',
                    'c.pth')
    process = start([words[0], '-c', code, *words[3:]], folder)
    assert process.wait(300) == -signal.SIGKILL
    assert load_checkpoint(folder / 'c.pth')['iteration'] == 1
    temporary, = folder.glob('.c.*.pth')
    assert temporary.stat().st_size > 100_000
    output = finish(start([*words, '--resume', 'auto'], folder), folder)
    assert 'iterations 1 to 2 ' in output and load_checkpoint(folder / 'c.pth')['iteration'] == 2
    assert not list(folder.glob('.c.*'))


def test_interrupted_evaluation_is_repeated_and_a_truncated_checkpoint_skipped(folder):
    """Killed in the last evaluation, after the last checkpoint; then the same command again."""
    words = ('--iterations', 1, '--resume', 'auto', '--checkpoint', 'c.pth')
    process = start(command(*words), folder)
    try:
        wait_for((folder / 'c.pth').exists, process, folder)
    finally:
        process.kill()
        process.wait()
    # A new run, as there was no checkpoint to resume.
    assert 'iterations 0 to 1 ' in (folder / 'output').read_text()
    assert not any(row['mAP'] for row in read_log(folder / 'c_log'))
    for _ in range(2):  # the second time, as from a job queue, nothing is left to do
        out = run(*words, folder=folder)
        assert 'iterations 1 to 1 ' in out and '1 iterations, written to c.pth' in out
        rows = read_log(folder / 'c_log')
        assert [row['iteration'] for row in rows] == ['1'] and float(rows[0]['mAP']) >= 0
    assert '1 iterations: mAP' not in out

    last, best = folder / 'c.pth', folder / 'c.best.pth'
    save_checkpoint(best, **{**load_checkpoint(best), 'iteration': 1})
    last.write_bytes(last.read_bytes()[:100_000])
    out = run('--iterations', 2, '--eval-every', 0, '--resume', 'auto', '--checkpoint', 'c.pth',
              folder=folder)
    assert 'note: c.pth cannot be read as a checkpoint' in out and 'iterations 1 to 2 ' in out


@pytest.mark.skipif(not hasattr(signal, 'sigtimedwait'), reason='signals have no sender here')
def test_preempted_run_and_one_whose_worker_is_killed_lose_no_iteration(folder):
    """Stop a run by SIGTERM to all of its processes, then by the end of a worker, and resume it.

    The workers are started in each of the three ways that Python has. They get the signal first,
    and have to serve more iterations than there are batches loaded.
    """
    n_iterations = 60 * KILLS
    words = ('--iterations', n_iterations, '--save-every', 1000, '--eval-every', 0)
    run(*words, '--checkpoint', 'whole.pth', folder=folder)

    def start_with(method):
        """Start the run, or resume it, with a start method of multiprocessing."""
        code = (f'import multiprocessing, runpy\nmultiprocessing.set_start_method({method!r})\n'
                f'runpy.run_path({str(ROOT / "tests" / "thin.py")!r}, run_name="__main__")')
        python, _, *arguments = command(*words, '--checkpoint', 'c.pth', '--resume', 'auto')
        return start([python, '-c', code, *arguments], folder)

    def wait_for_iteration(iteration, process):
        """Wait until the progress bar shows an iteration."""
        text = f' {iteration}/{n_iterations}'
        wait_for(lambda: text in (folder / 'output').read_text(), process, folder)

    done = 0
    for method in (*('fork', 'forkserver', 'spawn') * KILLS, None):
        process = start_with(method or 'fork')
        wait_for_iteration(done + 1, process)
        if method:
            for child in child_processes(process.pid):
                for pid in (*child_processes(child), child):    # of the fork server, and itself
                    os.kill(pid, signal.SIGTERM)
            wait_for_iteration(done + 6, process)
            process.terminate()
        else:
            *_, worker = child_processes(process.pid)   # before it, multiprocessing's own one
            os.kill(worker, signal.SIGKILL)
        output = finish(process, folder, code=1, timeout=120)
        before, done = done, load_checkpoint(folder / 'c.pth')['iteration']
        assert before < done < n_iterations
        message = 'stopped; resume with' if method else f'stopped after {done} iterations, written'
        assert message in output and 'Traceback' not in output
        # "a" if the worker ended while it sent a batch
        assert bool(re.search('train.py: (a )?DataLoader worker', output)) == (method is None)
    finish(start_with('fork'), folder)
    whole, stopped = (load_checkpoint(folder / f'{name}.pth') for name in ('whole', 'c'))
    assert_equal_checkpoints(whole, stopped)
    assert [row['iteration'] for row in read_log(folder / 'c_log')] == [
        str(iteration) for iteration in range(1, n_iterations + 1)]


# --- two ranks ---


def test_two_ranks_train_and_evaluate_as_one(folder):
    # Augmentation would add filler of one color, on which the priors' losses are equal: which of
    # them are the hard negatives would depend on rounding. (So it does with seed 0, in contiguous
    # tensors.)
    words = ('--iterations', 3, '--eval-every', 0, '--no-augment', '--lr', 1e-4,
             '--batch-size', 4, '--seed', 1)
    run(*words, '--checkpoint', 'one.pth', folder=folder)
    out = run(*words, '--checkpoint', 'two.pth', '--grad-accumulation', 2, '--compile', 'on',
              folder=folder, ranks=2)
    assert 'cpu x 2 processes' in out and out.count('3 iterations, written to two.pth') == 1
    assert 'torch.compile does not work' not in out and 'Grad strides' not in out
    one, two = (load_checkpoint(folder / f'{name}.pth') for name in ('one', 'two'))
    for name, weights in one['model'].items():
        assert torch.allclose(weights, two['model'][name], rtol=0, atol=1e-5), name
    torch.manual_seed(1)
    assert (one['model']['base.conv7.weight'] - ThinSSD300(3).base.conv7.weight).abs().max() > 1e-5
    logs = [read_log(folder / f'{name}_log') for name in ('one', 'two')]
    for rows in zip(*logs, strict=True):
        for column in ('iteration', 'loss', 'classes', 'boxes', 'rate'):
            assert float(rows[0][column]) == pytest.approx(float(rows[1][column]), rel=1e-3)

    tables = [re.findall(r'^(?:cat|dog|mAP) .*$', run(
        '--checkpoint', 'two.pth', '--batch-size', 1, folder=folder, script='eval.py', ranks=n),
        re.MULTILINE) for n in (1, 2)]
    assert len(tables[0]) == 3 and tables[0] == tables[1]


def test_ranks_normalize_their_own_images(folder):
    """Rank 0, whose statistics are saved, has the first two images of four."""
    run('--batch-norm', '--iterations', 1, '--batch-size', 4, '--eval-every', 0, '--checkpoint',
        'two.pth.tar', folder=folder, ranks=2)
    run('--batch-norm', '--iterations', 1, '--batch-size', 2, '--eval-every', 0, '--checkpoint',
        'one.pth.tar', folder=folder)
    two, one = (load_checkpoint(folder / name)['model'] for name in ('two.pth.tar', 'one.pth.tar'))
    names = [name for name in one if 'running' in name]
    assert len(names) == 2 * 23
    for name in names:
        torch.testing.assert_close(two[name], one[name])
    weights = [name for name in one if name.endswith('.weight')]
    assert not all(torch.equal(two[name], one[name]) for name in weights)


def test_ranks_evaluate_together_stop_at_a_signal_to_one_of_them_and_resume(folder):
    words = command('--iterations', 6, '--eval-every', 2, '--cache', '--checkpoint', 'c.pth',
                    '--resume', 'auto', ranks=2)
    log = folder / 'c_log' / 'log.csv'
    process = start(words, folder)
    wait_for(lambda: log.exists() and any(row['mAP'] for row in read_log(log.parent)), process,
             folder)
    os.kill(rank_1(process), signal.SIGTERM)
    out = finish(process, folder, code=1)
    done = load_checkpoint(folder / 'c.pth')['iteration']
    assert 2 <= done < 6 and f'{done} iterations, written to c.pth' in out
    assert out.count('stopped; resume with the same command') == 1

    out = finish(start(words, folder), folder)
    assert f'iterations {done} to 6 of 2 images' in out and out.count('cache: 7 images') == 1
    assert load_checkpoint(folder / 'c.pth')['iteration'] == 6
    rows = read_log(log.parent)
    assert [row['iteration'] for row in rows] == [str(i) for i in range(1, 7)]
    assert [row['iteration'] for row in rows if row['mAP']] == ['2', '4', '6']


def test_run_ends_if_one_rank_is_killed(folder):
    words = command('--iterations', 10_000, '--checkpoint', 'c.pth', ranks=2)
    process = start(words, folder)
    wait_for(lambda: ' 1/10000' in (folder / 'output').read_text(), process, folder)
    os.kill(rank_1(process), signal.SIGKILL)
    out = finish(process, folder, code=1, timeout=100)
    assert 'train.py: the other processes of this run cannot be reached' in out
    assert '--resume auto' in out


def test_user_error_in_one_rank_is_reported(folder):
    for path in json.loads((folder / 'lists' / 'TRAIN_images.json').read_text()):
        pathlib.Path(path).write_bytes(b'no image')
    out = run('--iterations', 3, '--checkpoint', 'c.pth', folder=folder, code=1, ranks=2)
    assert 'JPEGImages/im' in out and 'cannot be decoded' in out
