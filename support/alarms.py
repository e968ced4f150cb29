"""Report an event: a line of JSON, a command, a webhook; none of them delays the others.

Commands and webhooks run in threads, one after another. What fails is a line on standard error.
"""

import contextlib
import http.client
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request

from support.errors import UserError
from support.images import print_error, redact

# Seconds before the second and the third try.
RETRY_PAUSES = (1, 5)
# Seconds after which a line tells why the watch has not ended yet.
NOTICE_SECONDS = 1
# Events that may wait for a command or a webhook.
MAX_WAITING = 16


class Worker:
    """A thread that runs functions one after another; those without a place are dropped.

    A function that fails is called again after each of `RETRY_PAUSES`, if `retry`. Then the next
    ones would probably fail, too: after an interruption they are not called.
    """

    def __init__(self, name, max_waiting=MAX_WAITING, retry=False):
        """Start the thread.

        Args:
            name: begins the messages.
            max_waiting: how many functions may wait.
            retry: whether a function that fails is called again.
        """
        self.name, self.pauses = name, RETRY_PAUSES if retry else ()
        self.max_waiting, self.waiting = max_waiting, queue.Queue()
        self.no_retries = threading.Event()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, function, *args, is_limited=True):
        """Run a function in the thread, soon; if not `is_limited`, whatever number is waiting."""
        if is_limited and self.waiting.qsize() >= self.max_waiting:
            self.report(f'{self.max_waiting} are waiting; this one is dropped')
        else:
            self.waiting.put((function, args))

    def close(self, is_interrupted):
        """Wait until all are done; after an interruption, what fails is not tried again."""
        if is_interrupted:
            self.no_retries.set()
        self.waiting.put(None)
        self.thread.join(NOTICE_SECONDS)
        if self.thread.is_alive():
            self.report('not done yet, please wait')
            self.thread.join()

    def report(self, text):
        """Print a line, if the program that reads standard error has not ended."""
        with contextlib.suppress(OSError):
            print_error(f'{self.name}: {text}')

    def _run(self):
        """Run what is submitted."""
        is_failing, n_skipped = False, 0
        for function, args in iter(self.waiting.get, None):
            if is_failing and self.pauses and self.no_retries.is_set():
                n_skipped += 1
            else:
                is_failing = not self._try(function, args)
        if n_skipped:
            self.report(f'{n_skipped} were waiting; they are dropped')

    def _try(self, function, args):
        """Call a function up to three times; returns whether it succeeded."""
        for pause in (*self.pauses, None):
            try:
                function(*args)
                return True
            except Exception as error:  # it must not end the thread
                self.report(error)
                if pause is None or self.no_retries.wait(pause):
                    break
        return False


class Alarms:
    """Report events: print them, append them to a log file, run a command, call a webhook."""

    def __init__(self, log, command, webhook, timeout):
        """Check the arguments and start the threads.

        Args:
            log: path of the file, to which a line of JSON is appended per event.
            command: a command line, run without a shell, with the JSON on its standard input; or
                None.
            webhook: the URL to which the JSON is posted; or None.
            timeout: seconds that a command may take, and each wait for the webhook's server.
        """
        self.log, self.timeout = log, timeout
        self.functions = []     # (worker, function of the JSON)
        if command is not None:
            arguments = split_command(command)
            self.functions.append((Worker('command', retry=True),
                                   lambda text: run_command(arguments, text, timeout)))
        if webhook is not None:
            check_webhook(webhook)
            self.functions.append((Worker('webhook', retry=True),
                                   lambda text: post_json(webhook, text, timeout)))

    def send(self, event):
        """Report an event, a dictionary."""
        text = json.dumps(event) + '\n'
        try:
            print(text, end='', flush=True)
        except OSError as error:
            print_error(f'standard output: {error}')
        try:
            line_end = '\n' if is_cut_off(self.log) else ''
            with open(self.log, 'a', encoding='utf-8') as log_file:
                log_file.write(line_end + text)
        except OSError as error:
            print_error(f'{self.log} cannot be written ({error.strerror}); free some space')
        for worker, function in self.functions:
            worker.submit(function, text)

    def close(self, is_interrupted):
        """Wait for the threads; see Worker.close()."""
        for worker, _ in self.functions:
            worker.close(is_interrupted)


def is_cut_off(path):
    """Return whether the last line of a file has no end, as a full disk or a crash leaves it."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        return False
    with open(path, 'rb') as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b'\n'


def split_command(command):
    """Return the arguments of a command line as a list."""
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise UserError(f'--run {command}: {error}') from error
    if not arguments or shutil.which(arguments[0]) is None:
        raise UserError(f'--run {command}: there is no such program; give the path of an '
                        f'executable file')
    return arguments


def run_command(arguments, text, timeout):
    """Run a command with a text on its standard input; what it prints goes to standard error.

    Raises:
        UserError: it cannot be run or its exit status is not 0; or it does not end in time, then it
            is killed, with its children.
    """
    try:
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=2,
                                   start_new_session=True)
    except OSError as error:
        raise UserError(f'{arguments[0]} cannot be run ({error.strerror})') from error
    try:
        process.communicate(text.encode(), timeout)
    except subprocess.TimeoutExpired as error:
        if hasattr(os, 'killpg'):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        raise UserError(f'{arguments[0]} did not end within {timeout:g} seconds; killed'
                        ) from error
    if process.returncode:
        raise UserError(f'{arguments[0]} ended with status {process.returncode}')


def check_webhook(url):
    """Raise a UserError if a URL is not one that JSON can be posted to."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_valid = (parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0
                    and '@' not in parts.netloc and re.fullmatch('[!-~]+', url))
    except ValueError:      # an invalid port or IPv6 address
        is_valid = False
    if not is_valid:
        raise UserError(f'--webhook {redact(url)}: give http://HOST/PATH or https://HOST/PATH, '
                        f'in ASCII (others as %C3%A4, a space as %20), without a password before '
                        f'the host')


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Report a redirect as an error, so that no server sends the JSON elsewhere."""

    def redirect_request(self, *args):
        """Follow none."""


def post_json(url, text, timeout):
    """Post JSON to a URL.

    Raises:
        UserError: the server sent nothing for `timeout` seconds, or its status was not 2xx. Only
            the host is named, since the rest of the URL may be secret.
    """
    host = urllib.parse.urlsplit(url).hostname
    request = urllib.request.Request(url, text.encode(), {'Content-Type': 'application/json'})
    try:
        urllib.request.build_opener(NoRedirects).open(request, timeout=timeout).close()
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f'{host} answered {error.code} {error.reason}') from error
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f'{host} cannot be reached ({getattr(error, "reason", error)})') from error
