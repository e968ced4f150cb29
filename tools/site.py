"""Build the site: README, manual and modules as static pages that any server can serve.

    python -m tools.site
    python -m http.server --bind 127.0.0.1 --directory site

markdown-it renders the Markdown, pdoc the modules and the layout of all pages. Formulas are MathML,
which browsers draw themselves; no page requests anything from another host.
"""

import dataclasses
import html
import itertools
import pathlib
import posixpath
import re
import shutil

import tyro
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markupsafe import Markup
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pdoc import doc, render
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from support.errors import UserError, exit_on_user_error, make_folder
from tools.web import WEB, fetch_runtime

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEMPLATES = pathlib.Path(__file__).with_name('site_templates')
MODULES = ('model', 'utils', 'datasets', 'train', 'eval', 'detect', 'create_data_lists')
# A relative address of a file, and its anchor.
LINK = re.compile(r'\b(href|src|srcset)="(?![a-z]+:|#)([^"#\s]*)([^"]*)"')


@dataclasses.dataclass
class Parameters:
    """Build the site of README, manual and modules."""

    # Folder for the pages.
    output_folder: str = './site'
    # The network for the page of web/, as tools.export wrote it; if it does not exist, that page is
    # left out.
    model: str = str(WEB / 'model.onnx')


@exit_on_user_error
def main(parameters):
    """Write all pages, and the files that they link to."""
    output = make_folder(parameters.output_folder)
    pages = ['README.md', *sorted(f'docs/{path.name}' for path in ROOT.glob('docs/*.md')),
             'benchmarks.md']
    addresses = {page: page.replace('README', 'index').replace('.md', '.html') for page in pages}
    addresses |= {f'{name}.py': f'code/{name}.html' for name in MODULES}
    modules = {name: doc.Module.from_name(name) for name in MODULES}
    texts = {page: (ROOT / page).read_text(encoding='utf-8') for page in pages}
    menu = [(re.search('^# (.*)', text, re.MULTILINE)[1], addresses[page])
            for page, text in texts.items()]
    if pathlib.Path(parameters.model).is_file():
        copy_web(output / 'web', parameters.model)
        addresses['web'] = 'web/index.html'
        menu.append(('Detect in this browser', 'web/index.html'))
    configure(menu)
    write_modules(output / 'code', modules)
    parser, env = make_parser(), {'places': places_of_names(modules)}
    for page, text in texts.items():
        contents, content = render_markdown(parser, text, env)
        template = render.env.get_template('page.html.jinja2')
        write(output / addresses[page], template.render(
            title=contents[0][2], contents=contents, root='../' * page.count('/'),
            content=Markup(adapt_links(content, page, addresses, output))))
    print(output / 'index.html')


def write(path, text):
    """Write a page, into a new folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def copy_web(folder, model):
    """Copy the page that runs a network in the browser, its runtime and the network."""
    fetch_runtime(WEB / 'runtime')
    shutil.copytree(WEB, folder, ignore=shutil.ignore_patterns('*.onnx'), dirs_exist_ok=True)
    shutil.copy(model, folder / 'model.onnx')


# --------------------------------------------------------------------------------------------------
# Modules
# --------------------------------------------------------------------------------------------------


def configure(menu):
    """Set up pdoc's templates, which lay out all pages; the menu is (title, address) per page."""
    render.configure(docformat='google', favicon='data:,', template_directory=TEMPLATES)
    render.env.globals.update(
        menu=menu, modules=MODULES,
        dark_code=Markup(HtmlFormatter(style='github-dark').get_style_defs('.pdoc-code')))


def write_modules(folder, modules):
    """Write a page per module, with its source beside its docstrings, and the index of a search."""
    for name, module in modules.items():
        write(folder / f'{name}.html', render.html_module(module, modules))
    write(folder / 'search.js', render.search_index(modules))


def places_of_names(modules):
    """Return where the modules define a name, by the ways in which the text writes it.

    `match()` and `MultiBoxLoss.match()` are functions, `model.decimate` needs no parentheses. A
    name that is defined twice has no place, but `predict()` is the function, not a method.
    """
    functions = {member.name for module in modules.values() for member in module.own_members}
    places = {}
    for module_name, module in modules.items():
        places[f'{module_name}.py'] = {f'/{module_name}.py'}
        classes = (member for member in module.flattened_own_members if member.kind == 'class')
        for member in itertools.chain(*(scope.own_members for scope in (module, *classes))):
            qualified = f'{module_name}.{member.qualname}'
            names = {qualified, member.qualname}
            if member.kind == 'function':
                names = {qualified, f'{qualified}()', f'{member.qualname}()'}
                if member.name not in functions:    # a method
                    names.add(f'{member.name}()')
            for name in names:
                places.setdefault(name, set()).add(f'/{module_name}.py#{member.qualname}')
    return {name: place for name, (place, *others) in places.items() if not others}


# --------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------


def make_parser():
    """Return a parser of GitHub's Markdown; `env['places']` are the places of names in the code."""
    parser = MarkdownIt('commonmark').enable(['table', 'strikethrough'])
    parser.use(anchors_plugin, max_level=6)
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, renderer=render_formula)
    parser.add_render_rule('fence', render_block)
    parser.add_render_rule('code_inline', render_code)
    return parser


def render_formula(latex, options):
    """Render a formula between dollar signs, and on GitHub also between accents, as MathML."""
    return convert(latex.strip('`'), display='block' if options['display_mode'] else 'inline')


def render_block(renderer, tokens, index, options, env):
    """Render a fenced block: a formula, or code in its language's colors."""
    content, language = tokens[index].content, tokens[index].info.partition(' ')[0] or 'text'
    if language == 'math':
        return f'<div class="math">{convert(content, display="block")}</div>\n'
    return highlight(content, get_lexer_by_name(language), HtmlFormatter(cssclass='pdoc-code'))


def render_code(renderer, tokens, index, options, env):
    """Render code in a sentence, with a link to where it is defined, unless it is in a link."""
    code = tokens[index].content
    is_in_link = sum(token.nesting for token in tokens[:index] if token.tag == 'a')
    element = f'<code>{html.escape(code)}</code>'
    if code in env['places'] and not is_in_link:
        return f'<a href="{env["places"][code]}">{element}</a>'
    return element


def render_markdown(parser, text, env):
    """Return the headings of a Markdown text as (tag, anchor, text), and its HTML."""
    tokens = parser.parse(text, env)
    headings = [(token.tag, token.attrGet('id'), ''.join(
        child.content for child in title.children if child.type in ('text', 'code_inline')))
        for token, title in zip(tokens, tokens[1:]) if token.type == 'heading_open']
    return headings, parser.renderer.render(tokens, parser.options, env)


def adapt_links(content, page, addresses, output):
    """Adapt a page's links to the addresses of the site, and copy other files that it links to.

    Folders have no page: these links become plain text.

    Raises:
        UserError: a file does not exist.
    """
    folder = posixpath.dirname(page)

    def adapt(match):
        """Return the attribute with the address of the site."""
        attribute, path, anchor = match.groups()
        target = posixpath.normpath(posixpath.join('/', folder, path)).lstrip('/')
        source = ROOT / target
        if not source.exists():
            raise UserError(f'{page}: {path} does not exist; correct the link')
        if target not in addresses and source.is_dir():
            return ''
        if target not in addresses:
            (output / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, output / target)
        address = posixpath.relpath(addresses.get(target, target), folder or '.')
        return f'{attribute}="{address}{anchor}"'
    return LINK.sub(adapt, content)


if __name__ == '__main__':
    main(tyro.cli(Parameters))
