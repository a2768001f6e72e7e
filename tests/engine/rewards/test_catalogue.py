"""Every built-in reward says what it is, and the page says the same."""

from __future__ import annotations

import pytest

from gardo import plugins
from gardo.rewards import catalogue
from gardo.rewards.base import About
from tests import ROOT

NAMES = plugins.names("gardo.rewards")


@pytest.mark.parametrize("name", NAMES)
def test_every_reward_says_what_it_is(name):
    about = plugins.resolve("gardo.rewards", name).about
    assert isinstance(about, About) and about.formula and about.scale and about.verified


@pytest.mark.parametrize("name", NAMES)
def test_who_has_weights_of_others_says_their_licence(name):
    plugin = plugins.resolve("gardo.rewards", name)
    if catalogue.default_weights(plugin.Settings):
        assert plugin.about.licence != "-"


def test_the_page_has_the_table():
    page = (ROOT / "docs/rewards.md").read_text()
    table = page.partition("<!-- rewards: begin -->\n")[2].partition("\n<!-- rewards: end -->")[0]
    assert table == catalogue.as_markdown()
    assert len(table.splitlines()) == 2 + len(NAMES)


def test_the_list_has_them_all():
    text = catalogue.as_text().splitlines()
    assert [line for line in text if not line.startswith(" ")] == NAMES


def test_scripts_have_the_same_as_data():
    data = catalogue.as_data()
    assert [one["reward"] for one in data] == NAMES
    assert [tuple(one.values()) for one in data] == list(catalogue.rows())
    assert all(tuple(one) == catalogue.COLUMNS for one in data)
