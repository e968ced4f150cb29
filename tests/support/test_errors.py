"""Tests of support/errors.py."""

import errno
import math
import os
import secrets
import subprocess

import pytest
import torch

from support.errors import (
    UserError,
    atomic_write,
    check_at_least,
    check_fractions,
    exit_on_user_error,
    make_folder,
    process_namespace,
    remove_stale_temporaries,
)

# --------------------------------------------------------------------------------------------------
# User errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error, message', [
    (UserError('photo.jpg: cannot be decoded; replace it'), 'photo.jpg: cannot be decoded'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'gone.txt'), 'gone.txt'),
    (UserError('Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent '
               'call last):\n  File "a.py"\nsupport.errors.BrokenImageError: photo.jpg: cannot be '
               'decoded\n'), 'photo.jpg: cannot be decoded'),
    (torch.OutOfMemoryError('CUDA out of memory.\nDetails'), 'Give train.py --grad-accumulation'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), 'fewer --workers'),
    (RuntimeError('Pin memory thread exited unexpectedly'), 'fewer --workers'),
    (EOFError(), 'fewer --workers'), (ConnectionResetError(), 'fewer --workers'),
    (BrokenPipeError(), 'the program that reads the output has ended'),
    (MemoryError(), 'out of memory'),
    (KeyboardInterrupt(), 'interrupted'),
], ids=['user error', 'missing file', 'user error in a worker', 'GPU memory', 'killed worker',
        'pinning', 'half a batch', 'no batch', 'closed pipe', 'memory', 'Ctrl-C'])
def test_user_error_is_printed_as_one_line_with_exit_status_1(error, message, capsys):
    @exit_on_user_error
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == 1
    assert printed.out == ''
    assert printed.err.count('\n') == 1 and message in printed.err
    assert 'Traceback' not in printed.err


def test_memory_of_the_cpu_that_runs_out_is_one_line(capsys):
    with pytest.raises(SystemExit):
        exit_on_user_error(torch.empty)(1 << 50)
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'out of memory; give a smaller --batch-size' in err


@pytest.mark.parametrize('error', [ZeroDivisionError(), RuntimeError('a bug')], ids=repr)
def test_other_exceptions_are_raised(error):
    @exit_on_user_error
    def main():
        raise error
    with pytest.raises(type(error)):
        main()


def test_arguments_and_result_of_main_are_passed_on():
    assert exit_on_user_error(lambda x: x + 1)(2) == 3


def test_first_value_below_the_minimum_is_reported():
    check_at_least(1, batch_size=1, workers=2)
    with pytest.raises(UserError, match='^save_every is 0; give --save-every 1 or more$'):
        check_at_least(1, batch_size=1, save_every=0, workers=-1)
    with pytest.raises(UserError, match='^lr is nan; give --lr 0 or more$'):
        check_at_least(0, lr=math.nan)


@pytest.mark.parametrize('value', [-.01, 1.01, math.inf, math.nan])
def test_first_value_that_is_no_fraction_is_reported(value):
    check_fractions(min_score=0, max_overlap=1.)
    with pytest.raises(UserError, match=f'^max_overlap is {value}; give a number from 0 to 1$'):
        check_fractions(min_score=.5, max_overlap=value)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / 'result.txt'
    for content in ('old', 'new'):
        with atomic_write(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent and temporary.suffix == path.suffix
        assert path.read_text() == content
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text('half')
        1 / 0  # noqa: B018
    with pytest.raises(BrokenPipeError), atomic_write(path):    # of what the block prints
        raise BrokenPipeError
    with pytest.raises(UserError, match='result.txt.*No space left'), atomic_write(path):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert path.read_text() == 'new'
    assert os.listdir(tmp_path) == ['result.txt']


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, RuntimeError])
def test_error_of_the_work_in_the_block_is_not_one_of_the_file(tmp_path, error):
    with pytest.raises(error, match='CUDA'), atomic_write(tmp_path / 'result.txt'):
        raise error('CUDA out of memory')
    assert os.listdir(tmp_path) == []


def test_file_in_place_of_a_folder_is_reported(tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(UserError, match='file'):
            make_folder(folder)
    with pytest.raises(UserError, match='file'):
        with atomic_write(tmp_path / 'file' / 'result.txt') as temporary:
            temporary.write_text('content')


def test_folder_is_created_with_its_parents_and_left_empty(tmp_path):
    folder = make_folder(tmp_path / 'a' / 'b')
    assert folder.is_dir() and os.listdir(folder) == []
    assert make_folder(str(folder)) == folder


def test_file_has_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / 'result.txt') as temporary:
            temporary.write_text('content')
    finally:
        os.umask(before)
    if os.name == 'posix':
        assert (tmp_path / 'result.txt').stat().st_mode & 0o777 == 0o640


def test_file_that_a_symbolic_link_leads_to_is_replaced(tmp_path):
    disk, link = tmp_path / 'disk', tmp_path / 'net.pth'
    disk.mkdir()
    link.symlink_to(disk / 'content')
    for content in ('new', 'newer'):    # at first the link leads to no file
        with atomic_write(link) as temporary:
            temporary.write_text(content)
            assert temporary.parent == disk.resolve() and temporary.suffix == '.pth'
        assert link.is_symlink() and (disk / 'content').read_text() == content
    stale = disk / f'.net.{process_namespace()}-{end_process()}-01234567.pth'
    stale.touch()
    remove_stale_temporaries(link)
    assert os.listdir(disk) == ['content']


def test_symbolic_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, 'token_hex', lambda n: '01234567')
    with atomic_write(tmp_path / 'result.txt') as temporary:
        pass
    (tmp_path / 'other').write_text('old')
    temporary.symlink_to(tmp_path / 'other')
    with pytest.raises(UserError, match='result.txt.*File exists'):
        with atomic_write(tmp_path / 'result.txt') as temporary:
            temporary.write_text('new')
    assert (tmp_path / 'other').read_text() == 'old'


def test_temporary_files_of_two_writers_in_a_process_differ(tmp_path):
    path = tmp_path / 'result.txt'
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second


def end_process():
    """Return the number of a process that has ended."""
    process = subprocess.Popen(['true'])
    process.wait()
    return process.pid


def test_only_temporaries_of_ended_processes_are_removed(tmp_path):
    ended, here, elsewhere = end_process(), process_namespace(), '01234567'
    assert here
    stale = [f'.net.pth.{here}-{ended}-01234567.tar', f'.net.pth.{elsewhere}-1-01234567.tar']
    kept = [f'.net.pth.{elsewhere}-{ended}-01234567.tar', '.net.pth.notes.tar', 'net.pth.tar',
            f'.net.pth.{here}-{os.getpid()}-01234567.tar', f'.net.pth.{here}-1-01234567.tar',
            f'.other.pth.{here}-{ended}-01234567.tar']
    for name in stale + kept:
        (tmp_path / name).touch()
    os.utime(tmp_path / stale[1], times=(0, 0))     # not changed for years
    remove_stale_temporaries(tmp_path / 'net.pth.tar')
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    with atomic_write(tmp_path / 'net.pth.tar') as temporary:
        os.utime(temporary, times=(0, 0))
        remove_stale_temporaries(tmp_path / 'net.pth.tar')
        assert not temporary.exists()   # its name is of this form
        temporary.touch()
