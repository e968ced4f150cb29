"""Alarms: a command or a webhook that fails, hangs or is slow is a line, and holds up nothing."""

import http.server
import json
import pathlib
import threading
import time

import pytest

from support import alarms
from support.alarms import Alarms, Worker, post_json, run_command, split_command
from support.errors import UserError

EVENT = {'event': 'alarm', 'seen': '2 persons, 1 dog'}


@pytest.fixture(autouse=True)
def local_and_quick(monkeypatch):
    """Retry at once, and use no proxy."""
    monkeypatch.setattr(alarms, 'RETRY_PAUSES', (0, 0))
    monkeypatch.setenv('no_proxy', '*')


@pytest.fixture
def webhook():
    """Yield the URL of a server, the list of the bodies it gets, and the list of its next answers.

    Answers are status codes; None is never an answer, and after the last one it is 204. Content
    that is no JSON is answered 415.
    """
    bodies, answers, stop = [], [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers['Content-Length'])))
            status = answers.pop(0) if answers else 204
            if self.headers['Content-Type'] != 'application/json':
                status = 415
            if status is None:
                stop.wait(20)
                return
            self.send_response(status)
            self.send_header('Location', 'file:///etc/passwd')
            self.send_header('Content-Length', '0')
            self.end_headers()

        def log_message(self, *args):
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/token', bodies, answers
    stop.set()
    server.shutdown()
    server.server_close()


def send_all(tmp_path, *events, **options):
    """Send events and wait for the threads; returns the lines of the log."""
    sender = Alarms(tmp_path / 'log.jsonl', options.get('command'), options.get('webhook'), 60)
    for event in events:
        sender.send(event)
    sender.close(is_interrupted=False)
    return (tmp_path / 'log.jsonl').read_text().splitlines()


def test_event_is_printed_appended_to_the_log_and_given_to_command_and_webhook(
        tmp_path, webhook, capsys):
    url, bodies, _ = webhook
    (tmp_path / 'log.jsonl').write_text('earlier\n')
    lines = send_all(tmp_path, EVENT, webhook=url,
                     command=f"sh -c 'cat > \"$0\"' '{tmp_path}/with space'")
    assert lines[0] == 'earlier' and json.loads(lines[1]) == EVENT
    assert capsys.readouterr().out == lines[1] + '\n'
    assert (tmp_path / 'with space').read_text() == lines[1] + '\n'
    assert [json.loads(body) for body in bodies] == [EVENT]


def test_webhook_that_fails_is_tried_three_times(tmp_path, webhook, capsys):
    url, bodies, answers = webhook
    answers += [500, 500, 500, 503]
    send_all(tmp_path, {'event': 'first'}, {'event': 'second'}, webhook=url)
    assert [json.loads(body)['event'] for body in bodies] == ['first'] * 3 + ['second'] * 2
    error = capsys.readouterr().err
    assert error.count('127.0.0.1 answered 500') == 3 and error.count('answered 503') == 1
    assert 'token' not in error


def test_webhook_that_never_answers_does_not_hold_up_others(tmp_path, webhook, capsys):
    url, _, answers = webhook
    answers += [None] * 25
    sender = Alarms(tmp_path / 'log.jsonl', f"sh -c 'cat >> {tmp_path}/out'", url, 0.5)
    for _ in range(25):
        sender.send(EVENT)
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 25  # all at once
    sender.close(is_interrupted=True)
    error = capsys.readouterr().err
    assert 'webhook: 127.0.0.1 cannot be reached (timed out)' in error
    assert 'webhook: 16 are waiting; this one is dropped' in error  # bounded memory
    assert 'were waiting; they are dropped' in error    # without a timeout for each


def test_redirect_is_not_followed(webhook):
    url, bodies, answers = webhook
    for status in (301, 302, 307, 308):
        answers.append(status)
        with pytest.raises(UserError, match=f'answered {status}'):
            post_json(url, '{}', 60)
    assert len(bodies) == 4


def test_webhook_that_is_not_there():
    with pytest.raises(UserError, match='127.0.0.1 cannot be reached .*refused'):
        post_json('http://127.0.0.1:9/token', '{}', 1)


def test_command_that_hangs_is_killed_with_its_children(tmp_path):
    pid = tmp_path / 'pid'
    with pytest.raises(UserError, match='sh did not end within 3 seconds'):
        run_command(['sh', '-c', f'sleep 60 & echo $! > {pid}; wait'], 'x' * 10 ** 6, 3)
    status = pathlib.Path(f'/proc/{int(pid.read_text())}/stat')
    for _ in range(100):    # until it is gone, or nobody's zombie
        if not status.exists() or status.read_text().split()[2] == 'Z':
            return
        time.sleep(0.05)
    raise AssertionError('the child still runs')


def test_command_that_fails_is_tried_three_times(tmp_path, capsys):
    send_all(tmp_path, EVENT, command=f"sh -c 'echo x >> {tmp_path}/tries; exit 3'")
    assert (tmp_path / 'tries').read_text() == 'x\n' * 3
    assert capsys.readouterr().err.count('command: sh ended with status 3') == 3


def test_unwritable_log_is_a_line(tmp_path, capsys):
    sender = Alarms(tmp_path / 'missing' / 'log.jsonl', None, None, 1)
    sender.send(EVENT)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == EVENT
    assert 'log.jsonl cannot be written (No such file' in captured.err


def test_full_disk_is_a_line(capsys):
    if not pathlib.Path('/dev/full').exists():
        pytest.skip('no /dev/full')
    Alarms('/dev/full', None, None, 1).send(EVENT)
    assert '/dev/full cannot be written (No space left on device)' in capsys.readouterr().err


def test_line_after_one_that_a_full_disk_has_cut_off_is_whole(tmp_path, capsys):
    """The limit is that of the whole process: with capsys, pytest writes no files meanwhile."""
    resource = pytest.importorskip('resource')
    sender = Alarms(tmp_path / 'log', None, None, 1)
    sender.send({'event': 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        sender.send({'event': 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sender.send({'event': 3})
    sender.send({'event': 4})
    assert (tmp_path / 'log').read_text() == (
        '{"event": 1}\n' '{"event' '\n' '{"event": 3}\n' '{"event": 4}\n')


def test_line_after_one_that_could_not_be_written_follows_directly(tmp_path, capsys):
    log = tmp_path / 'log'
    sender = Alarms(log, None, None, 1)
    sender.send({'event': 1})
    log.rename(tmp_path / 'kept')
    log.mkdir()
    sender.send({'event': 2})
    assert f'{log} cannot be written' in capsys.readouterr().err
    log.rmdir()
    (tmp_path / 'kept').rename(log)
    sender.send({'event': 3})
    assert log.read_text() == '{"event": 1}\n{"event": 3}\n'


def test_interrupted_worker_tries_once(capsys):
    def fail():
        raise UserError('no')

    worker = Worker('test', retry=True)
    worker.pauses = (60, 60)
    worker.submit(fail)
    worker.close(is_interrupted=True)
    assert capsys.readouterr().err == 'test: no\n'


def test_clips_do_not_wait_for_a_place_if_they_must_not(capsys):
    """And one that fails does not drop the others."""
    go_on, done = threading.Event(), []
    worker = Worker('clip', max_waiting=1)
    worker.submit(go_on.wait)
    worker.submit(lambda: 1 / 0, is_limited=False)
    for i in range(4):
        worker.submit(done.append, i, is_limited=False)
    go_on.set()
    worker.close(is_interrupted=True)
    assert done == [0, 1, 2, 3] and capsys.readouterr().err == 'clip: division by zero\n'


def test_long_end_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(alarms, 'NOTICE_SECONDS', 0.01)
    worker = Worker('clip')
    worker.submit(time.sleep, 0.5)
    worker.close(is_interrupted=False)
    assert capsys.readouterr().err == 'clip: not done yet, please wait\n'


def test_broken_standard_error_does_not_end_the_thread(monkeypatch):
    """The program that reads it has ended."""
    def print_error(text):
        raise BrokenPipeError

    monkeypatch.setattr(alarms, 'print_error', print_error)
    worker, done = Worker('test'), []
    worker.submit(lambda: 1 / 0)
    worker.submit(done.append, 1)
    worker.close(is_interrupted=False)
    assert done == [1]


def test_unexpected_error_does_not_end_the_thread(capsys):
    worker, done = Worker('test', retry=True), []
    worker.submit(lambda: 1 / 0)
    worker.submit(done.append, 1)
    worker.close(is_interrupted=False)
    assert capsys.readouterr().err == 3 * 'test: division by zero\n' and done == [1]


@pytest.mark.parametrize('options', [
    {'command': 'no-such-program now'}, {'command': ''}, {'command': "sh -c 'open"},
    {'webhook': 'file:///etc/passwd'}, {'webhook': 'localhost:8000'}, {'webhook': 'http:///path'},
    {'webhook': 'https://user:secret@host/'}, {'webhook': 'http://host/t\xe4'},
    {'webhook': 'http://host/?token=secret '}, {'webhook': 'http://host/a\nb'},
    {'webhook': 'http://[host/'}, {'webhook': 'http://host:a/'}, {'webhook': 'http://host:70000/'}])
def test_invalid_options_are_user_errors(options):
    with pytest.raises(UserError) as info:
        Alarms('log', options.get('command'), options.get('webhook'), 1)
    assert 'secret' not in str(info.value)


def test_command_line_is_split_without_a_shell():
    assert split_command("sh -c 'echo $HOME' \"a b\"") == ['sh', '-c', 'echo $HOME', 'a b']
