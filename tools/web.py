"""Serve the page that runs an exported network in the browser, on this computer alone.

    python -m tools.export checkpoint.pth.tar web/model.onnx
    python -m tools.web

The first start fetches onnxruntime-web with npm into web/runtime/; later ones need no network.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import pathlib
import shutil
import subprocess
import tarfile
import tempfile

import tyro

from support.errors import UserError, atomic_write, exit_on_user_error, make_folder

WEB = pathlib.Path(__file__).resolve().parent.parent / 'web'

PACKAGE = 'onnxruntime-web@1.30.0'
SHA512 = 'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
# What worker.js imports, and what that imports: a build for the CPU, and one for WebGPU as well.
# The last one is written last, and begins with its version.
RUNTIME_FILES = ('ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm',
                 'ort-wasm-simd-threaded.asyncify.mjs', 'ort-wasm-simd-threaded.asyncify.wasm',
                 'ort.webgpu.min.mjs', 'ort.wasm.min.mjs')


@dataclasses.dataclass
class Parameters:
    """Serve the page that runs an exported network in the browser."""

    # The file that tools.export wrote.
    model: str = str(WEB / 'model.onnx')
    # The address is http://127.0.0.1:PORT/; with 0 a free port is chosen.
    port: int = 8000


class Handler(http.server.SimpleHTTPRequestHandler):
    """Send files with the headers that WebAssembly's threads need."""

    # Not left to the system, whose table may lack them or, on Windows, contradict them.
    extensions_map = {'.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript',
                      '.mjs': 'text/javascript', '.wasm': 'application/wasm',
                      '': 'application/octet-stream'}

    def __init__(self, *args, model, **kwargs):
        self.model = model
        super().__init__(*args, **kwargs)

    def translate_path(self, path):
        """Return the file of an address; the model may be in another folder than the page."""
        return self.model if path == '/model.onnx' else super().translate_path(path)

    def end_headers(self):
        """Add the headers to every response."""
        self.send_header('Cross-Origin-Opener-Policy', 'same-origin')
        self.send_header('Cross-Origin-Embedder-Policy', 'require-corp')
        # With `no-cache` the browser would keep its model where another --model is an older file.
        self.send_header('Cache-Control', 'no-store')
        super().end_headers()

    def handle(self):
        """Answer a request, without a traceback where the page is left before the answer's end."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_):
        """Print nothing per request."""


@exit_on_user_error
def main(parameters):
    """Fetch the runtime if it is missing, and serve the page until Ctrl-C."""
    p = parameters
    if not pathlib.Path(p.model).is_file():
        raise UserError(f'{p.model} is missing; python -m tools.export CHECKPOINT {p.model} writes '
                        f'it')
    fetch_runtime(WEB / 'runtime')
    with make_server(WEB, p.model, p.port) as server:
        print(f'http://127.0.0.1:{server.server_port}/ (Ctrl-C ends the server)', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def fetch_runtime(folder):
    """Fetch the runtime's files into a folder, unless they are there in the version of `PACKAGE`.

    Raises:
        UserError: npm is missing, has no network, or sends something else.
    """
    version = f'v{PACKAGE.partition("@")[2]}\n'.encode()
    if (all((folder / name).exists() for name in RUNTIME_FILES)
            and version in (folder / RUNTIME_FILES[-1]).read_bytes()):
        return
    make_folder(folder)
    print(f'fetching {PACKAGE} (33 MB) into {folder}', flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        archive = download(temporary)
        sha512 = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if sha512 != SHA512:
            raise UserError(f'{PACKAGE} has the SHA-512 {sha512} in place of {SHA512}; it was '
                            f'changed on the way')
        with tarfile.open(archive) as tar:
            for name in RUNTIME_FILES:
                with atomic_write(folder / name) as path:
                    path.write_bytes(tar.extractfile(f'package/dist/{name}').read())


def download(folder):
    """Let npm download the package's archive into a folder; returns its path."""
    npm = shutil.which('npm')
    if npm is None:
        raise UserError('npm is missing; install Node.js, which includes it (apt-get install npm, '
                        'brew install node)')
    try:
        subprocess.run([npm, 'pack', PACKAGE, '--pack-destination', folder], check=True,
                       capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise UserError(f'npm cannot fetch {PACKAGE} ({error.stderr.strip()[-300:]}); check the '
                        f'network connection') from error
    archive, = pathlib.Path(folder).glob('*.tgz')
    return archive


def make_server(folder, model, port):
    """Return a server of a folder's files and a model, reachable from this computer alone."""
    handler = functools.partial(Handler, directory=folder, model=model)
    try:
        return http.server.ThreadingHTTPServer(('127.0.0.1', port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(f'port {port} cannot be used ({error}); give another --port') from error


if __name__ == '__main__':
    main(tyro.cli(Parameters))
