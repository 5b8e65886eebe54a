import pytest

from fifa.formatting import number, percent, seconds, shorten, shorten_lines

NAN = float("nan")


def test_text_is_shortened_and_cannot_reorder_the_page():
    assert shorten("a\x00b\nc\u202ed\ud800") == "a b c\ufffdd\ufffd"
    assert len(shorten("x" * 10_000_000)) == 300
    assert shorten(None) == ""
    assert shorten("x" * 300) == "x" * 300


def test_lines_stay_lines():
    assert shorten_lines("a\tb\nc\x07") == "a b\nc "


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.7534, "75.3 %"), (1.0, "100 %"), (0.0, "0 %"), (0.00512, "0.51 %"), (NAN, "\u2013")],
)
def test_a_share_is_written_as_per_cent(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-0.4431, "\u22120.443"), (1234567.0, "1,234,567"), (NAN, "\u2013")]
)
def test_a_number_has_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.44, "0.4 s"), (75.2, "1 min 15 s"), (7500, "2 h 05 min")]
)
def test_a_time_is_written_in_the_unit_it_needs(value, text):
    assert seconds(value) == text
