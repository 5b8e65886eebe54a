from fifa.console import echo_once


def test_what_is_said_once_is_not_repeated(capsys):
    for text in ("pickscore: on a card", "hpsv2: on a card", "pickscore: on a card"):
        echo_once(text)
    assert capsys.readouterr().err.splitlines() == ["pickscore: on a card", "hpsv2: on a card"]
