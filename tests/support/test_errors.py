"""Tests of support/errors.py."""

import errno
import os
import subprocess

import pytest
import torch

from support.errors import (
    UserError,
    atomic_write,
    check_at_least,
    exit_on_user_error,
    make_folder,
    remove_stale_temporaries,
)

# --------------------------------------------------------------------------------------------------
# User errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error, message', [
    (UserError('photo.jpg: cannot be decoded; replace it'), 'photo.jpg: cannot be decoded'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'gone.txt'), 'gone.txt'),
    (UserError('Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent '
               'call last):\n  File "a.py"\nsupport.errors.UserError: photo.jpg: cannot be '
               'decoded\n'), 'photo.jpg: cannot be decoded'),
    (torch.OutOfMemoryError('CUDA out of memory.\nDetails'), 'Give a smaller --batch-size'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), 'fewer --workers'),
    (KeyboardInterrupt(), 'interrupted'),
], ids=['user error', 'missing file', 'user error in a worker', 'GPU memory', 'killed worker',
        'Ctrl-C'])
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
    with pytest.raises(UserError, match='result.txt.*No space left'), atomic_write(path):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert path.read_text() == 'new'
    assert os.listdir(tmp_path) == ['result.txt']


def test_memory_that_runs_out_is_not_reported_as_an_unwritable_file(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), atomic_write(tmp_path / 'result.txt'):
        raise torch.OutOfMemoryError('CUDA out of memory')
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


def test_only_temporaries_of_ended_processes_are_removed(tmp_path):
    ended = subprocess.Popen(['true'])
    ended.wait()
    names = [f'.net.pth.{ended.pid}.tar', f'.net.pth.{os.getpid()}.tar', 'net.pth.tar',
             f'.other.pth.{ended.pid}.tar', '.net.pth.notes.tar']
    for name in names:
        (tmp_path / name).touch()
    remove_stale_temporaries(tmp_path / 'net.pth.tar')
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
