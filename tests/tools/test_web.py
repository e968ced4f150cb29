"""Tests of the page in web/, in Chromium, and of tools/web.py, which serves it.

They are skipped without Chromium (apt-get install chromium), and where npm cannot fetch the runtime
that `python -m tools.web` keeps in web/runtime/.
"""

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from torchvision.transforms.functional import pil_to_tensor

import detect
from model import SSD300
from support.errors import UserError
from thin import ThinSSD300
from tools import export, web
from utils import distinct_colors, to_rgb, warp

ROOT = pathlib.Path(__file__).resolve().parents[2]
# As the page does; by default a processor with bf16 instructions uses them.
predict = functools.partial(detect.predict, precision='float32')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
FLAGS = ['--no-sandbox', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
CAMERA, PERMISSION = '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'
# A GPU in software, which takes half a minute per image.
WEBGPU = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan']

# Count in the page the requests to its worker, and keep the threshold of the last one.
COUNT_REQUESTS = """
window.counts = {unanswered: 0, most: 0, all: 0, minScore: 0};
window.Worker = class extends Worker {
  constructor(...args) {
    super(...args);
    this.addEventListener('message', () => counts.unanswered--);
  }
  postMessage(...args) {
    counts.all++;
    counts.minScore = args[0].minScore;
    counts.most = Math.max(counts.most, ++counts.unanswered);
    super.postMessage(...args);
  }
};
"""

# In a script: move the slider of the lowest score.
MOVE_SLIDER = """
const slider = document.getElementById('min_score');
slider.value = 0.58;
slider.dispatchEvent(new Event('input'));
"""


# --------------------------------------------------------------------------------------------------
# A network, a server and a browser
# --------------------------------------------------------------------------------------------------


def draw(width, height, mode='RGB', seed=0):
    """Return an image of random spots of color."""
    levels = np.random.default_rng(seed).integers(0, 256, (6, 8, 4)).astype(np.uint8)
    return Image.fromarray(levels, 'RGBA').convert(mode).resize((width, height))


def standardize(layer, inputs, output):
    """Change a convolution so that its outputs have the mean 0 and the standard deviation 2."""
    scale = 2 / output.std()
    layer.weight.data *= scale
    layer.bias.data -= scale * output.mean((0, 2, 3))


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """Return a small SSD300 that detects a few objects of each class, and its exported file."""
    torch.manual_seed(0)
    model = ThinSSD300(4).eval()
    # One more than the network has, for an index that published weights leave unused.
    model.label_map = {'background': 0, 'cat': 1, 'dog': 2, 'übung "ü"': 3, 'N/A 4': 4}
    images = pil_to_tensor(draw(300, 300))[None]
    layers = (*model.pred_convs.loc_convs, *model.pred_convs.class_convs)
    hooks = [layer.register_forward_hook(standardize) for layer in layers]
    with torch.no_grad():
        model(model.normalize(images))
        for hook in hooks:
            hook.remove()
        for i, layer in enumerate(model.pred_convs.class_convs):
            layer.bias.view(-1, 4)[:, 0] += 100 if i < 2 else 5     # few objects, and large ones
    path = tmp_path_factory.mktemp('network') / 'network.onnx'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSD300, 'from_checkpoint', lambda _: model)
        export.main(export.Parameters('thin.pth.tar', str(path)))
    return model, path


@contextlib.contextmanager
def serving(server):
    """Serve in another thread; yields the address."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/'
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope='module')
def runtime():
    """Fetch the browser's runtime, once; skip the tests where that is impossible."""
    if not CHROMIUM:
        pytest.skip('Chromium is not installed')
    try:
        web.fetch_runtime(web.WEB / 'runtime')
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='module')
def address(network, runtime):
    """Serve the page with the network."""
    with serving(web.make_server(web.WEB, str(network[1]), port=0)) as url:
        yield url


@pytest.fixture
def plain_server(tmp_path, runtime):
    """Serve a copy of the page without a model in a folder, by a server without special headers.

    Returns the folder and its address.
    """
    folder = tmp_path / 'some' / 'where'
    shutil.copytree(web.WEB, folder, ignore=shutil.ignore_patterns('runtime', '*.onnx'))
    (folder / 'runtime').symlink_to(web.WEB / 'runtime')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with serving(http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)) as url:
        yield folder, f'{url}some/where/'


@pytest.fixture(scope='module')
def browsers():
    """Return a function that starts Chromium with flags, once for the same ones."""
    with sync_playwright() as playwright, contextlib.ExitStack() as stack:
        @functools.cache
        def start(flags):
            return stack.enter_context(playwright.chromium.launch(
                executable_path=CHROMIUM, args=[*FLAGS, *flags]))
        yield start


@pytest.fixture
def visit(browsers):
    """Return a function that opens an address in a new profile: `visit(url, *flags, **context)`.

    At the end of the test no page may have had an error or requested anything of another host.
    """
    pages, origins, requests, errors = [], [], [], []

    def start(url, *flags, script='', **context):
        page = browsers(flags or ('--disable-gpu',)).new_context(**context).new_page()
        page.on('request', lambda request: requests.append(request.url))
        page.on('pageerror', lambda error: errors.append(error))
        page.add_init_script(script)
        origins.append(re.match(r'http://(127\.0\.0\.1|0\.0\.0\.0):\d+/', url)[0])
        page.goto(url)
        pages.append(page)
        return page
    yield start
    for page in pages:
        page.context.close()
    assert errors == []
    assert all(url.removeprefix('blob:').startswith((*origins, 'data:,'))
               for url in requests), requests


def drop(page, *files, script=''):
    """Drop files, each a name and bytes, one after the other on the page; then run a script."""
    page.evaluate("""(files) => {
      for (const [name, content] of files) {
        const dataTransfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        dataTransfer.items.add(new File([bytes], name));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true}));
      }
    """ + script + '}', [[name, base64.b64encode(content).decode()] for name, content in files])


def wait_for(page, selector, pattern):
    """Wait until the text of an element matches a pattern."""
    expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=60_000)


def upload(page, path):
    """Choose a photo, wait for its objects, and return them as predict() does."""
    page.set_input_files('#file', path)
    wait_for(page, '#result', r'ms\.$')
    return read_objects(page)


def read_objects(page):
    """Return the page's table of objects as predict() does."""
    rows = [row.split('\n') for row in page.locator('#objects').evaluate(
        "body => Array.from(body.rows, row => Array.from(row.cells, cell => cell.textContent)"
        ".join('\\n'))")]
    return {'labels': [name for name, *_ in rows],
            'scores': torch.tensor([float(score) for _, score, _ in rows]),
            'boxes': torch.tensor([[float(side) for side in box.split(', ')]
                                   for *_, box in rows]).view(-1, 4)}


def assert_same(objects, expected):
    """Compare objects of the page with those of predict()."""
    assert objects['labels'] == expected['labels']
    torch.testing.assert_close(objects['boxes'], expected['boxes'], atol=2, rtol=0)
    torch.testing.assert_close(objects['scores'], expected['scores'], atol=0.02, rtol=0)


# --------------------------------------------------------------------------------------------------
# Detection
# --------------------------------------------------------------------------------------------------

RESIZE = """async ([file, antialias]) => {
  const {resize} = await import('/resize.js');
  const bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
  const resized = resize(await createImageBitmap(new Blob([bytes])), 300, antialias);
  return btoa(Array.from(resized, (level) => String.fromCharCode(level)).join(''));
}"""


@pytest.mark.parametrize('antialias', [True, False])
def test_resizing_equals_pillows(visit, address, antialias):
    page = visit(address + 'style.css')     # a page without the network
    rng = np.random.default_rng(0)
    for width, height, mode in ((640, 480, 'RGB'), (300, 300, 'L'), (41, 901, 'RGB'),
                                (900, 7, 'RGB'), (500, 375, 'LA')):
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
        if mode == 'LA':
            noise.putalpha(draw(width, height, 'L'))
        file = io.BytesIO()
        noise.save(file, 'png')
        resized = page.evaluate(RESIZE, [base64.b64encode(file.getvalue()).decode(), antialias])
        expected = pil_to_tensor(warp(to_rgb(noise), (0, 0, width, height), antialias=antialias))
        levels = np.frombuffer(base64.b64decode(resized), np.uint8).reshape(3, 300, 300)
        assert np.abs(levels - expected.int().numpy()).max() <= 1, (width, height, mode)


def test_photo_is_detected_as_by_predict(visit, address, network, tmp_path):
    model, path = network[0], tmp_path / 'photo.jpg'
    photo = draw(480, 640)
    exif = photo.getexif()
    exif[0x0112] = 6    # to be turned by 90 degrees
    photo.save(path, exif=exif, quality=90)
    photo = Image.open(path)
    page = visit(address)
    wait_for(page, '#status', r'CPU \(WebAssembly, \d threads\): no WebGPU')
    wait_for(page, '#classes', r'cat, dog, übung "ü"\.$')
    expected, = predict([photo], model=model)
    assert len(set(expected['labels'])) == 3
    assert_same(upload(page, path), expected)
    expect(page.locator('#result')).to_contain_text('640 × 480 pixels')
    assert page.locator('#picture').evaluate('(canvas) => [canvas.width, canvas.height]') == [
        640, 480]

    # The sliders, with the keyboard alone.
    for element in ('file', 'camera', 'min_score'):
        page.keyboard.press('Tab')
        assert page.evaluate('document.activeElement.id') == element
    page.keyboard.press('End')
    wait_for(page, '#result', '^No objects')
    for _ in range(20):
        page.keyboard.press('ArrowLeft')
    page.keyboard.press('Tab')
    page.keyboard.press('Home')
    page.keyboard.press('ArrowRight')
    expected, = predict([photo], min_score=0.58, max_overlap=0.05, model=model)
    expect(page.locator('#objects tr')).to_have_count(len(expected['labels']))
    assert_same(read_objects(page), expected)


def test_slider_is_moved_while_the_first_photo_is_computed(visit, address, network, tmp_path):
    photo = draw(480, 640)
    photo.save(tmp_path / 'photo.png')
    page = visit(address)
    wait_for(page, '#status', 'Ready')
    drop(page, ('photo.png', (tmp_path / 'photo.png').read_bytes()), script=MOVE_SLIDER)
    expected, = predict([photo], min_score=0.58, model=network[0])
    expect(page.locator('#objects tr')).to_have_count(len(expected['labels']), timeout=60_000)
    assert_same(read_objects(page), expected)


def test_large_photo_on_a_dark_phone(visit, address, network, tmp_path):
    path = tmp_path / 'photo.jpg'
    draw(8660, 5774).save(path)     # 50 megapixels
    page = visit(address, viewport={'width': 375, 'height': 667}, color_scheme='dark',
                 is_mobile=True, has_touch=True)
    expected, = predict([Image.open(path)], model=network[0])
    assert_same(upload(page, path), expected)
    expect(page.locator('#result')).to_contain_text('8660 × 5774 pixels')
    page.click('summary')
    assert page.evaluate('document.documentElement.scrollWidth') == 375
    width, height = page.locator('#picture').evaluate('(canvas) => [canvas.width, canvas.height]')
    assert (width, height) == (1600, 1067)
    color = page.evaluate("getComputedStyle(document.documentElement).color")
    assert color == 'rgb(255, 255, 255)'


def test_photo_remains_after_one_that_is_too_wide(visit, address, network, tmp_path):
    photo = draw(480, 640)
    photo.save(tmp_path / 'photo.png')
    Image.new('RGB', (70_000, 2)).save(tmp_path / 'wide.png')
    page = visit(address)
    upload(page, tmp_path / 'photo.png')
    page.set_input_files('#file', tmp_path / 'wide.png')
    wait_for(page, '#problem', 'the image is too wide for this browser')
    page.press('#min_score', 'ArrowRight')
    expected, = predict([photo], min_score=0.22, model=network[0])
    expect(page.locator('#objects tr')).to_have_count(len(expected['labels']), timeout=60_000)
    wait_for(page, '#result', '480 × 640 pixels')
    assert_same(read_objects(page), expected)


def test_no_box_crosses_a_label(visit, address):
    page = visit(address + 'style.css')
    # An edge of the second box, at x = 120, crosses the label of the first, 134 < y < 150.
    on_label, on_box = page.evaluate("""async () => {
      const {draw} = await import('/drawing.js');
      const picture = await createImageBitmap(new ImageData(400, 300));
      const canvas = document.createElement('canvas');
      draw(canvas, picture, [{name: 'MMMMMM', label: 1, score: 1, box: [0.2, 0.5, 0.9, 0.9]},
                             {name: 'm', label: 2, score: 0.5, box: [0.3, 0.1, 0.6, 0.9]}]);
      const context = canvas.getContext('2d');
      return [135, 100].map((y) => Array.from(context.getImageData(120, y, 1, 1).data));
    }""")
    colors = distinct_colors({'background': 0, 'MMMMMM': 1, 'm': 2})
    assert [f'#{bytes(level[:3]).hex()}' for level in (on_label, on_box)] == [
        colors['MMMMMM'], colors['m']]


# --------------------------------------------------------------------------------------------------
# The camera
# --------------------------------------------------------------------------------------------------


def test_camera_runs_and_takes_a_photo(visit, address):
    page = visit(address, CAMERA, PERMISSION, script=COUNT_REQUESTS)
    page.click('#camera')
    wait_for(page, '#result', r'640 × 480 pixels, \d+ ms\.$')
    for _ in range(300):
        page.wait_for_timeout(100)
        counts = page.evaluate('counts')
        if counts['all'] > 5:
            break
    assert counts['all'] > 5 and counts['most'] == 1    # frames are skipped, not queued
    # The last frame has the thresholds that were set before the camera is stopped.
    page.evaluate(f"{MOVE_SLIDER} document.getElementById('camera').click();")
    expect(page.locator('#camera')).to_have_text('Start camera')
    for _ in range(300):
        page.wait_for_timeout(100)
        if page.evaluate('counts.unanswered') == 0:
            break
    assert page.evaluate('counts.minScore') == 0.58
    # By the keyboard: the camera's button keeps the focus, and takes that of the other one.
    page.press('#camera', 'Enter')
    expect(page.locator('#take')).to_be_enabled()
    assert page.evaluate('document.activeElement.id') == 'camera'
    page.press('#take', 'Enter')
    expect(page.locator('#camera')).to_have_text('Start camera')
    assert page.evaluate('document.activeElement.id') == 'camera'
    page.wait_for_timeout(500)
    n_requests = page.evaluate('counts.all')
    page.wait_for_timeout(500)
    assert page.evaluate('counts.all') == n_requests
    expect(page.locator('#problem')).to_be_empty()


@pytest.mark.parametrize('flag, sentence', [
    (CAMERA, 'The camera was refused: allow it'),
    (PERMISSION, 'No camera was found'),
], ids=['refused', 'missing'])
def test_camera_that_cannot_be_used(visit, address, tmp_path, flag, sentence):
    page = visit(address, flag)
    page.click('#camera')
    wait_for(page, '#problem', sentence)
    expect(page.locator('#camera')).to_be_enabled()
    draw(300, 300).save(tmp_path / 'photo.png')
    upload(page, tmp_path / 'photo.png')    # works nevertheless
    expect(page.locator('#problem')).to_be_empty()
    page.click('#camera')
    wait_for(page, '#problem', sentence)
    expect(page.locator('#result')).to_contain_text('300 × 300 pixels')     # still shown


def test_photo_is_chosen_while_the_camera_starts(visit, address, tmp_path):
    draw(300, 300).save(tmp_path / 'photo.png')
    page = visit(address, CAMERA, PERMISSION)
    upload(page, tmp_path / 'photo.png')
    page.evaluate("""() => {
      const {play} = HTMLMediaElement.prototype;
      HTMLMediaElement.prototype.play = function () {
        const started = play.call(this);
        document.getElementById('file').dispatchEvent(new Event('change'));
        return started;
      };
    }""")
    page.click('#camera')
    expect(page.locator('#camera')).to_be_enabled()
    wait_for(page, '#result', '300 × 300 pixels')
    expect(page.locator('#problem')).to_be_empty()
    expect(page.locator('#take')).to_be_disabled()


# --------------------------------------------------------------------------------------------------
# Other conditions
# --------------------------------------------------------------------------------------------------


NOTES = 'notes.txt', b'no image'
DROP_TWO_AT_ONCE = """() => {
  const dataTransfer = new DataTransfer();
  for (const name of ['a.png', 'b.png']) dataTransfer.items.add(new File(['no image'], name));
  document.dispatchEvent(new DragEvent('drop', {dataTransfer}));
}"""


def test_dropped_file_that_is_no_image_and_link(visit, address, tmp_path):
    page = visit(address)
    drop(page, NOTES)
    wait_for(page, '#problem', 'notes.txt is not an image that this browser can read')
    expect(page.locator('#result')).to_be_empty()
    page.evaluate("""() => {
      const dataTransfer = new DataTransfer();
      document.dispatchEvent(new DragEvent('drop', {dataTransfer}));
    }""")
    wait_for(page, '#problem', 'Drop a file')
    draw(300, 300).save(tmp_path / 'photo.png')
    upload(page, tmp_path / 'photo.png')
    expect(page.locator('#problem')).to_be_empty()


def test_two_files_that_are_dropped_at_once(visit, address, tmp_path):
    draw(300, 300).save(tmp_path / 'photo.png')
    page = visit(address, script=COUNT_REQUESTS)
    upload(page, tmp_path / 'photo.png')
    n_requests = page.evaluate('counts.all')
    page.evaluate(DROP_TWO_AT_ONCE)
    expect(page.locator('#problem')).to_have_text('Drop one photo at a time.')
    expect(page.locator('#result')).to_contain_text('300 × 300 pixels')     # still shown
    assert page.evaluate('counts.all') == n_requests
    drop(page, ('photo.png', (tmp_path / 'photo.png').read_bytes()))
    expect(page.locator('#problem')).to_be_empty()
    assert page.evaluate('counts.all') == n_requests + 1


def test_photo_that_is_dropped_before_the_answer(visit, address, tmp_path):
    draw(300, 300).save(tmp_path / 'photo.png')
    page = visit(address)
    wait_for(page, '#status', 'Ready')
    drop(page, NOTES, ('photo.png', (tmp_path / 'photo.png').read_bytes()))
    wait_for(page, '#result', '300 × 300 pixels')
    expect(page.locator('#problem')).to_be_empty()


@pytest.mark.parametrize('model, sentence', [
    (None, 'model.onnx is missing beside this page'),
    (b'no network', 'model.onnx is not a whole file'),
    ('cut off', 'model.onnx is not a whole file'),
    ('without runtime', 'runtime/ beside this page is missing'),
])
def test_missing_or_broken_files(visit, plain_server, network, model, sentence):
    folder, url = plain_server
    whole = network[1].read_bytes()
    if model is not None:
        (folder / 'model.onnx').write_bytes(
            {'cut off': whole[:-1000], 'without runtime': whole}.get(model, model))
    if model == 'without runtime':
        (folder / 'runtime').unlink()
    page = visit(url)
    wait_for(page, '#problem', sentence)
    expect(page.locator('#camera')).to_be_disabled()
    expect(page.locator('#status')).to_be_empty()
    drop(page, NOTES)   # nothing reads it, so the sentence stays
    page.evaluate(DROP_TWO_AT_ONCE)
    wait_for(page, '#problem', sentence)
    expect(page.locator('#result')).to_be_empty()


def test_any_server_and_folder_will_do(visit, plain_server, network, tmp_path):
    folder, url = plain_server
    shutil.copy(network[1], folder / 'model.onnx')
    photo = draw(200, 300, 'RGBA')
    photo.save(tmp_path / 'photo.png')
    page = visit(url)
    wait_for(page, '#status', r'CPU \(WebAssembly, 1 thread\): no WebGPU')
    expected, = predict([photo], model=network[0])
    assert_same(upload(page, tmp_path / 'photo.png'), expected)
    assert page.locator('#picture').evaluate("""(canvas) => {
      const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return data.every((level, i) => i % 4 < 3 || level === 255);
    }""")      # white behind transparent pixels


def test_http_from_another_computer(visit, plain_server, network):
    folder, url = plain_server
    shutil.copy(network[1], folder / 'model.onnx')
    # This address reaches the server, too, but browsers do not trust it as they do 127.0.0.1.
    page = visit(url.replace('127.0.0.1', '0.0.0.0'))
    wait_for(page, '#status', r'CPU \(WebAssembly, 1 thread\): WebGPU needs https')
    page.click('#camera')
    wait_for(page, '#problem', 'Browsers give the camera only to pages from https')


def test_cpu_is_used_where_webgpu_fails(visit, plain_server, network, tmp_path):
    folder, url = plain_server
    shutil.copy(network[1], folder / 'model.onnx')
    (folder / 'runtime').unlink()
    shutil.copytree(web.WEB / 'runtime', folder / 'runtime')
    # A build without WebGPU, in the place of the one with it.
    shutil.copy(folder / 'runtime/ort.wasm.min.mjs', folder / 'runtime/ort.webgpu.min.mjs')
    page = visit(url, *WEBGPU)
    wait_for(page, '#status', 'Ready')
    if 'no WebGPU' in page.inner_text('#status'):
        pytest.skip('this Chromium has no WebGPU without a GPU')
    wait_for(page, '#status', 'CPU .*, as WebGPU cannot run this network')
    draw(300, 300).save(tmp_path / 'photo.png')
    upload(page, tmp_path / 'photo.png')


def test_other_hosts_cannot_be_reached(visit, address):
    server = http.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler)
    with serving(server) as other:
        page = visit(address + 'index.html')
        # By the page, and by a worker that is started as the page starts its own.
        is_refused = page.evaluate("""async (url) => {
          const isRefused = `fetch('${url}', {mode: 'no-cors'}).then(() => false, () => true)`;
          const source = new Blob([`${isRefused}.then(postMessage)`]);
          const worker = new Worker(URL.createObjectURL(source));
          return [await fetch(url, {mode: 'no-cors'}).then(() => false, () => true),
                  await new Promise((resolve) => { worker.onmessage = (e) => resolve(e.data); })];
        }""", other)
        assert is_refused == [True, True]


# --------------------------------------------------------------------------------------------------
# tools/web.py
# --------------------------------------------------------------------------------------------------


def test_server_sends_headers_and_the_model(network, runtime):
    process = subprocess.Popen([sys.executable, '-m', 'tools.web', '--port', '0', '--model',
                                str(network[1])], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = re.match(r'http://127\.0\.0\.1:\d+/', process.stdout.readline())[0]
        with urllib.request.urlopen(url) as response:
            assert response.headers['Cross-Origin-Opener-Policy'] == 'same-origin'
            assert response.headers['Cross-Origin-Embedder-Policy'] == 'require-corp'
            assert b'Nothing leaves this computer' in response.read()
        with urllib.request.urlopen(f'{url}model.onnx') as response:
            assert response.read() == network[1].read_bytes()
    finally:
        process.terminate()
        process.wait(20)


def test_other_model_is_seen_even_if_it_is_older(visit, runtime, tmp_path):
    model = tmp_path / 'model.onnx'
    with serving(web.make_server(web.WEB, str(model), port=0)) as url:
        page = visit(url + 'style.css')
        for content, age in (('one', 0), ('other', 3600)):
            model.write_text(content)
            changed = model.stat().st_mtime - age
            os.utime(model, (changed, changed))
            assert page.evaluate(
                "fetch('/model.onnx').then((response) => response.text())") == content


def test_page_that_is_left_early_prints_nothing(tmp_path, capsys):
    (tmp_path / 'model.onnx').write_bytes(bytes(30_000_000))
    with web.make_server(tmp_path, str(tmp_path / 'model.onnx'), 0) as server:
        with socket.create_connection(server.server_address) as browser:
            browser.sendall(b'GET /model.onnx HTTP/1.0\r\n\r\n')
        server.process_request_thread(*server.get_request())
    assert capsys.readouterr().err == ''


def test_port_in_use_and_missing_model(tmp_path, capsys):
    with web.make_server(tmp_path, 'model.onnx', 0) as server:
        with pytest.raises(UserError, match='give another --port'):
            web.make_server(tmp_path, 'model.onnx', server.server_port)
    with pytest.raises(UserError, match='port 70000 cannot be used'):
        web.make_server(tmp_path, 'model.onnx', 70000)
    with pytest.raises(SystemExit):
        web.main(web.Parameters(model=str(tmp_path / 'model.onnx')))
    assert 'python -m tools.export' in capsys.readouterr().err


def test_runtime_is_fetched_once_and_checked(tmp_path, monkeypatch):
    archive, folder = tmp_path / 'package.tgz', tmp_path / 'runtime'
    header = f'/*!\n * ONNX Runtime Web v{web.PACKAGE.partition("@")[2]}\n'.encode()
    with tarfile.open(archive, 'w:gz') as tar:
        for name in (*web.RUNTIME_FILES, 'other.js'):
            info = tarfile.TarInfo(f'package/dist/{name}')
            info.size = len(header)
            tar.addfile(info, io.BytesIO(header))
    npm = tmp_path / 'bin' / 'npm'
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\ncp {archive} "$4"\n')
    npm.chmod(0o755)
    monkeypatch.setenv('PATH', f'{npm.parent}{os.pathsep}{os.environ["PATH"]}')
    with pytest.raises(UserError, match='SHA-512'):
        web.fetch_runtime(folder)
    assert list(folder.iterdir()) == []
    digest = hashlib.sha512(archive.read_bytes()).digest()
    monkeypatch.setattr(web, 'SHA512', base64.b64encode(digest).decode())
    web.fetch_runtime(folder)
    assert {path.name for path in folder.iterdir()} == set(web.RUNTIME_FILES)
    monkeypatch.setenv('PATH', '')
    web.fetch_runtime(folder)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='install Node.js'):
        patch.setattr(web, 'PACKAGE', 'onnxruntime-web@0.1')
        web.fetch_runtime(folder)
    (folder / web.RUNTIME_FILES[0]).unlink()
    with pytest.raises(UserError, match='install Node.js'):
        web.fetch_runtime(folder)
