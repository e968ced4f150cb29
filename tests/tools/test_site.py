"""Tests of tools/site.py: its Markdown, and in Chromium every page of the site that it builds.

Those in Chromium are skipped without it (apt-get install chromium); the page of web/ is left out
where npm cannot fetch its runtime.
"""

import functools
import http.server
import re
import shutil
import threading
import urllib.parse

import pytest
from pdoc import doc
from playwright.sync_api import expect, sync_playwright

from model import SSD300
from support.errors import UserError
from thin import ThinSSD300
from tools import export, site, web

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']


# --------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------

TEXT = r'''# A page: `SSD300`, twice
## A page: `SSD300`, twice
`match()`, `SSD300`, [`model.py`](../model.py), $`a_1`$ and $b$, $5 and $6.

| a | b |
| --- | --- |
| 1 | ~~2~~ |

```math
\frac{a}{b}
```

```python
x = 1
```

<picture><source media="(prefers-color-scheme: dark)" srcset="../img/demo.jpg">
<img src="../img/demo.jpg" alt=""></picture>

[manual](web.md#on-a-web-server) [license](../LICENSE) [folder](../img) [paper](https://a.org/b.md)
'''


def render(text, output, page='docs/page.md'):
    """Return the HTML of a text as if it were a page of the repository."""
    env = {'places': {'match()': '/model.py#MultiBoxLoss.match', 'SSD300': '/model.py#SSD300',
                      'model.py': '/model.py'}}
    headings, content = site.render_markdown(site.make_parser(), text, env)
    addresses = {'model.py': 'code/model.html', 'docs/web.md': 'docs/web.html'}
    return headings, site.adapt_links(content, page, addresses, output)


def test_markdown_is_rendered_as_on_github(tmp_path):
    headings, content = render(TEXT, tmp_path)
    assert headings == [('h1', 'a-page-ssd300-twice', 'A page: SSD300, twice'),
                        ('h2', 'a-page-ssd300-twice-1', 'A page: SSD300, twice')]
    for part in ('<a href="../code/model.html#MultiBoxLoss.match"><code>match()</code></a>',
                 '<a href="../code/model.html"><code>model.py</code></a>',
                 '<td><s>2</s></td>', '<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow>',
                 '<msub><mi>a</mi><mn>1</mn></msub>', '$5 and $6', 'class="pdoc-code"',
                 'srcset="../img/demo.jpg"', 'src="../img/demo.jpg"',
                 '<a href="web.html#on-a-web-server">', '<a href="../LICENSE">', '<a >folder</a>',
                 '<a href="https://a.org/b.md">'):
        assert part in content, part
    assert {path.name for path in tmp_path.rglob('*.*')} == {'demo.jpg'}
    assert (tmp_path / 'LICENSE').exists()


def test_a_link_to_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r'page\.md: none\.md does not exist'):
        render('[x](none.md)', tmp_path)


def test_names_have_the_places_where_they_are_defined():
    places = site.places_of_names({name: doc.Module.from_name(name) for name in site.MODULES})
    expected = {'model.py': '/model.py', 'SSD300': '/model.py#SSD300',
                'model.decimate': '/model.py#decimate', 'train.main()': '/train.py#main',
                'predict()': '/detect.py#predict',      # a class has a method of this name
                'match()': '/model.py#MultiBoxLoss.match',
                'MultiBoxLoss.match()': '/model.py#MultiBoxLoss.match'}
    assert {name: places.get(name) for name in expected} == expected
    # Defined in several modules, and in several classes of one.
    assert not {'main()', 'Parameters', 'forward()'} & set(places)


# --------------------------------------------------------------------------------------------------
# The site in Chromium
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    """Build the site in a folder of a plain server; returns its address, and if web/ is in it."""
    if not CHROMIUM:
        pytest.skip('Chromium is not installed')
    root = tmp_path_factory.mktemp('server')
    network = root / 'network.onnx'
    with pytest.MonkeyPatch.context() as patch:
        model = ThinSSD300(3).eval()
        model.label_map = {'background': 0, 'cat': 1, 'dog': 2}
        patch.setattr(SSD300, 'from_checkpoint', lambda _: model)
        try:
            web.fetch_runtime(web.WEB / 'runtime')
            export.main(export.Parameters('thin.pth.tar', str(network)))
        except UserError as error:
            print(error)
    site.main(site.Parameters(str(root / 'some' / 'where'), str(network)))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/some/where/', network.exists()
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(address):
    """Return a function that opens an address: `visit(url, **context)`.

    At the end of the test no page may have reported an error or requested anything of another host.
    """
    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def start(url, **context):
            page = browser.new_context(**context).new_page()
            page.on('console', lambda message: message.type in ('error', 'warning')
                    and problems.append(f'{page.url}: {message.text}'))
            page.on('pageerror', lambda error: problems.append(f'{page.url}: {error}'))
            page.on('request', lambda request: re.match(
                r'(blob:)?http://127\.0\.0\.1:|data:', request.url) or problems.append(request.url))
            page.goto(url)
            return page
        yield start
        browser.close()
    assert problems == []


MISSING_PICTURES = """Array.from(document.images)
    .filter((image) => !image.naturalWidth).map((image) => image.src)"""
LINKS = "Array.from(document.querySelectorAll('a[href]'), (link) => link.href)"
ANCHORS = "Array.from(document.querySelectorAll('[id]'), (element) => element.id)"


def test_every_page_is_whole(visit, address):
    url, has_network = address
    page, links, anchors, pending = visit(url), set(), {}, [f'{url}index.html']
    while pending:
        current = pending.pop()
        page.goto(current)
        assert page.evaluate(MISSING_PICTURES) == []
        anchors[current] = {'', *page.evaluate(ANCHORS)}
        for link in page.evaluate(LINKS):
            target, anchor = urllib.parse.urldefrag(link)
            if target.startswith(url):
                links.add((target, anchor, current))
                if target.endswith('.html') and target not in {*anchors, *pending}:
                    pending.append(target)
    assert {f'{url}code/{name}.html' for name in site.MODULES} <= set(anchors)
    assert has_network == (f'{url}web/index.html' in anchors)
    assert [(target, anchor, source) for target, anchor, source in links
            if not (urllib.parse.unquote(anchor) in anchors[target] if target in anchors
                    else page.request.get(target).ok)] == []


def test_first_page_on_a_dark_phone(visit, address):
    page = visit(address[0], viewport={'width': 375, 'height': 667}, color_scheme='dark',
                 is_mobile=True, has_touch=True)
    assert page.evaluate(MISSING_PICTURES) == []
    assert page.evaluate('document.documentElement.scrollWidth') == 375
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(13, 17, 23)'
    formulas = page.locator('math').all_text_contents()
    assert len(formulas) > 5
    assert not [formula for formula in formulas if '\\' in formula]     # an unknown command
    page.click('#navtoggle')
    page.click('text=model.py >> visible=true')
    page.wait_for_load_state()
    assert page.url.endswith('code/model.html')
    assert page.evaluate('document.documentElement.scrollWidth') == 375


def test_source_is_beside_the_docstrings(visit, address):
    page = visit(f'{address[0]}code/model.html')
    source = page.locator('#MultiBoxLoss-view-source ~ .pdoc-code').first
    expect(source).not_to_be_visible()
    page.click('label[for=MultiBoxLoss-view-source]')
    expect(source).to_contain_text('class MultiBoxLoss(')
    page.fill('input[type=search]', 'jaccard')
    expect(page.locator('main')).to_contain_text('find_jaccard_overlap')


def test_network_runs_in_the_browser(visit, address):
    url, has_network = address
    if not has_network:
        pytest.skip('the runtime of web/ cannot be fetched')
    page = visit(url + 'web/index.html')
    expect(page.locator('#status')).to_have_text(re.compile('WebAssembly'), timeout=60_000)
