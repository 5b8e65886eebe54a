"""How the site is built from the pages of this folder: `make docs`."""

import re

import click
from docutils import nodes
from docutils.parsers.rst import Directive

import fifa
from fifa.cli import cli

project = "FiFA"
author = "The FiFA contributors"
copyright = author
version = release = fifa.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"FiFA {release}"
html_baseurl = ""
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 4
myst_enable_extensions = ["fieldlist"]
default_role = "py:obj"  # `fifa.select` in a docstring is a link
autodoc_mock_imports = ["torch", "transformers", "diffusers", "peft", "accelerate", "safetensors"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Pairs": "fifa.Pairs", "Scores": "fifa.Scores"}
napoleon_use_rtype = False
napoleon_use_ivar = True


class Commands(Directive):
    """The help of every command, as its own section: the same text as `fifa COMMAND --help`."""

    def run(self):
        """The sections."""
        return [_section(name, command) for name, command in sorted(_commands(cli, ""))]


def _commands(group, before):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def _section(name, command):
    context = click.Context(command, info_name=f"fifa {name}", max_content_width=100)
    context.terminal_width = 96
    section = nodes.section(ids=[f"fifa-{name.replace(' ', '-')}"])
    section += nodes.title(text=f"fifa {name}")
    section += nodes.literal_block(text=command.get_help(context), language="none")
    return section


def _without_files(app, name, source):
    """Links to files of the repository, which the site has not, become their text."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", source[0])


def setup(app):
    """What Sphinx calls."""
    app.add_directive("commands", Commands)
    app.connect("source-read", _without_files)
