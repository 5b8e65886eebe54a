"""The pages over HTTP: voting, blindness, and everybody who is not to come in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from vote_worlds import draw, make_run, read_index, write_index

from fifa.config import Vote
from fifa.errors import FifaError
from fifa.evaluation.vote.app import create_app
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.pictures import Pictures
from fifa.shards.files import write_bytes

HERE = "http://127.0.0.1:8750"
TOKENS = {"invitation": "i" * 22, "owner": "o" * 22}
JSON = {"accept": "application/json"}


@pytest.fixture
def ballot(tmp_path: Path) -> Ballot:
    return Ballot(make_run(tmp_path / "run", prompts=4, seeds=1))


@pytest.fixture
def client(ballot: Ballot) -> Iterator[TestClient]:
    with TestClient(create_app(ballot), base_url=HERE) as client:
        yield client


def token(page: str) -> str:
    found = re.search(r'name="token" value="(\w+)"', page)
    assert found
    return found[1]


def begin(client: TestClient, **fields: str) -> str:
    """Start to vote; gives the token of the forms."""
    own = token(client.get("/").text)
    page = client.post("/start", data={"token": own, **fields})
    assert page.status_code == 200
    assert 'id="vote"' in page.text
    return own


def cast(client: TestClient, own: str, position: int, answer: str = "left") -> Any:
    fields = {"token": own, "position": str(position), "answer": answer}
    return client.post("/vote", data=fields, headers=JSON)


def test_a_person_votes_through_the_script(client: TestClient, ballot: Ballot) -> None:
    own = begin(client, name="  Ada   Lovelace ")
    for position in range(4):
        answer = cast(client, own, position)
        assert answer.status_code == 200
        assert answer.json()["position"] == position + 1
        assert len(ballot.store.read().votes) == position + 1
    assert answer.json()["done"]
    assert "Thank you" in client.get("/").text
    assert ballot.store.read().voters == {1: "Ada Lovelace"}


def test_a_person_votes_without_a_script(client: TestClient, ballot: Ballot) -> None:
    own = begin(client)
    page = client.post("/vote", data={"token": own, "position": "0", "answer": "tie"})
    assert "2 of 4" in page.text
    page = client.post("/undo", data={"token": own, "position": "1"})
    assert "1 of 4" in page.text
    assert ballot.store.read().votes == []


def test_reloading_shows_the_same_pair(client: TestClient) -> None:
    own = begin(client)
    cast(client, own, 0)
    images = [re.findall(r"/image/\w+\.png", client.get("/").text) for _ in range(2)]
    assert images[0] == images[1]
    assert len(images[0]) == 2


def test_what_is_loaded_ahead_is_what_comes_next(client: TestClient) -> None:
    own = begin(client)
    first = cast(client, own, 0).json()
    second = cast(client, own, 1).json()
    assert first["upcoming"] == second["images"]
    assert cast(client, own, 2).json()["upcoming"] == []


def test_a_second_tab_that_is_behind_is_told_where_the_voter_is(client: TestClient) -> None:
    own = begin(client)
    cast(client, own, 0, "left")
    late = cast(client, own, 0, "right")
    assert late.status_code == 409
    assert late.json()["position"] == 1
    assert cast(client, own, 0, "left").status_code == 200  # the same vote, sent twice


def test_two_voters_do_not_meet(client: TestClient, ballot: Ballot) -> None:
    own = begin(client)
    cast(client, own, 0)
    with TestClient(create_app(ballot), base_url=HERE) as other:
        theirs = begin(other)
        assert theirs != own
        assert cast(other, own, 0).status_code == 403  # one's form with another's cookie
        assert cast(other, theirs, 0).json()["position"] == 1
    assert cast(client, own, 1).json()["position"] == 2
    assert [vote.voter for vote in ballot.store.read().votes] == [1, 1, 2]


def test_leaving_makes_room_for_another_voter(client: TestClient, ballot: Ballot) -> None:
    own = begin(client)
    cast(client, own, 0)
    page = client.post("/leave", data={"token": own})
    assert 'action="/start"' in page.text
    begin(client)
    assert len(ballot.store.read().voters) == 2


def test_nothing_that_is_sent_says_which_model(client: TestClient) -> None:
    own = begin(client)
    said = []
    for position in range(4):
        page = client.get("/")
        said += [page.text, str(page.headers)]
        for image in re.findall(r"/image/\w+\.png", page.text):
            got = client.get(image)
            assert got.headers["content-type"] == "image/png"
            said += [got.content.decode("latin-1"), str(got.headers)]
        said.append(cast(client, own, position).text)
    for word in ("secret", "base/", "base<", "tuned", "images/", ".sqlite", "evaluate"):
        assert not any(word in text for text in said), word


def test_sides_and_order_differ_between_voters(ballot: Ballot) -> None:
    seen, names = set(), set()
    for _ in range(6):
        with TestClient(create_app(ballot), base_url=HERE) as client:
            begin(client)
            shown = re.findall(r"/image/\w+\.png", client.get("/").text)
            names |= set(shown)
            seen.add(tuple(client.get(name).content for name in shown))
    assert len(seen) > 2
    assert len(names) == 12  # nobody's names are another's


def test_a_picture_is_there_for_its_own_voter_only(client: TestClient, ballot: Ballot) -> None:
    begin(client)
    image = re.findall(r"/image/\w+\.png", client.get("/").text)[0]
    mine = client.get(image)
    assert mine.status_code == 200
    assert mine.headers["cache-control"].startswith("private")
    assert mine.headers["vary"] == "Cookie"
    assert int(mine.headers["content-length"]) == len(mine.content)
    with TestClient(create_app(ballot), base_url=HERE) as other:
        assert other.get(image).status_code == 404
        begin(other)
        assert other.get(image).status_code == 404
    for wrong in ("00l", "0r", "1l", "99l", "9" * 9 + "l", "9" * 30 + "l", "-1l", "٣l"):
        name = wrong + image[len("/image/0l") :]
        assert client.get(f"/image/{name}").status_code == 404


HOSTILE = '<script>alert(1)</script> "quoted" \u202ereversed'


def test_a_hostile_prompt_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=1, seeds=1, prompt=HOSTILE)
    with TestClient(create_app(Ballot(run)), base_url=HERE) as client:
        begin(client, name=HOSTILE)
        page = client.get("/").text
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)" in page
        assert "\u202e" not in page
        assert cast(client, token(page), 0).status_code == 200
        results = client.get("/results").text
        assert "<script>" not in results
        assert "\u202e" not in results


PAGES = ["/", "/results", "/vote.css", "/vote.js", "/icon.svg", "/nothing", "/image/x.png"]


@pytest.mark.parametrize("path", PAGES)
def test_every_answer_has_the_security_headers(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers


def test_no_page_names_another_host_or_has_inline_code(client: TestClient) -> None:
    own = begin(client)
    cast(client, own, 0)
    for path in PAGES[:4]:
        text = client.get(path).text
        assert not re.search(r"https?://(?!www\.w3\.org)", text), path
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", text), path


@pytest.mark.parametrize(
    "path",
    [
        "/image/../../evaluate/votes.sqlite",
        "/image/..%2f..%2fvotes.sqlite",
        "/image/images%2Fbase%2F0000-0.png",
        "/image/0000-0.png",
        "/image/",
        "/images",
        "/votes.sqlite",
        "/static/",
        "/templates/vote.html.j2",
        "/image/%00.png",
        "/docs",
        "/openapi.json",
    ],
)
def test_nothing_else_of_the_disk_is_there(client: TestClient, path: str) -> None:
    begin(client)
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8750", 200),
        ("localhost:8750", 200),
        ("[::1]:8750", 200),
        ("192.168.1.7", 200),  # nobody can make an address resolve to another one
        ("vote.example.org", 200),  # --allow-host
        ("VOTE.example.org:80", 200),
        ("evil.example.com", 421),
        ("127.0.0.1.evil.example.com", 421),
        ("127.0.0.1:8750@evil.example.com", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_only_known_hosts_are_answered(ballot: Ballot, host: str, status: int) -> None:
    app = create_app(ballot, hosts=("vote.example.org",))
    with TestClient(app, base_url=HERE) as client:
        assert client.get("/", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": HERE}, 200),
        ({"origin": "null"}, 200),  # what forms send under the referrer policy
        ({"origin": "https://evil.example.com"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://]127.0.0.1:8750"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
    ],
)
def test_votes_come_from_this_page_only(
    client: TestClient, ballot: Ballot, headers: dict[str, str], status: int
) -> None:
    own = begin(client)
    fields = {"token": own, "position": "0", "answer": "left"}
    got = client.post("/vote", data=fields, headers=JSON | headers)
    assert got.status_code == status
    assert len(ballot.store.read().votes) == (status == 200)


def test_a_form_needs_its_token(client: TestClient, ballot: Ballot) -> None:
    own = begin(client)
    for wrong in ({}, {"token": ""}, {"token": "0" * 32}, {"token": own[:-1]}, {"token": "ü"}):
        for path in ("/vote", "/undo", "/start", "/leave"):
            fields = {"position": "0", "answer": "left", **wrong}
            assert client.post(path, data=fields).status_code == 403, path
    assert ballot.store.read().votes == []


def test_a_voter_cookie_is_no_key_to_others(client: TestClient, ballot: Ballot) -> None:
    answer = client.get("/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    begin(client)
    value = next(iter(client.cookies.jar)).value
    assert value
    assert value.encode() not in ballot.store.database.path.read_bytes()


def test_what_is_too_long_is_refused(client: TestClient, ballot: Ballot) -> None:
    own = begin(client)
    fields = {"token": own, "position": "0", "answer": "left", "more": "x" * 5000}
    assert client.post("/vote", data=fields).status_code == 413

    def stream() -> Iterator[bytes]:
        yield f"token={own}&position=0&answer=left".encode()

    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/vote", content=stream(), headers=form).status_code == 411
    both = form | {"content-length": "9", "transfer-encoding": "chunked"}
    assert client.post("/vote", content=b"token=abc", headers=both).status_code == 411
    for wrong in ("&".join(f"f{i}=1" for i in range(20)), f"token={own}&token={own}", "a=%ff",
                  "a=\xff", "a=%ed%a0%80"):  # fmt: skip
        assert client.post("/vote", content=wrong, headers=form).status_code == 400, wrong
    assert ballot.store.read().votes == []


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "-1"},
        {"position": "x"},
        {"position": "9" * 30},
        {"position": "0\0"},
        {"position": "٣"},
        {"position": " 0"},
        {"answer": "left\0"},
        {"answer": "both"},
        {"answer": ""},
    ],
)
def test_a_vote_that_makes_no_sense(
    client: TestClient, ballot: Ballot, changes: dict[str, str]
) -> None:
    own = begin(client)
    fields = {"token": own, "position": "0", "answer": "left"} | changes
    assert client.post("/vote", data=fields, headers=JSON).status_code == 400
    assert ballot.store.read().votes == []


def test_other_methods_are_refused(client: TestClient) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert client.request(method, "/").status_code == 405
    assert client.get("/vote").status_code == 405


@pytest.fixture
def public(ballot: Ballot) -> Iterator[TestClient]:
    with TestClient(create_app(ballot, tokens=TOKENS), base_url="http://10.0.0.5") as client:
        yield client


def test_without_an_invitation_nothing_is_shown(public: TestClient, ballot: Ballot) -> None:
    ballot.register("who", None)
    image = ballot.showing("who").images[0]  # type: ignore[union-attr]
    for path in (
        "/",
        f"/image/{image}.png",
        "/results",
        "/vote.js",
        "/?invitation=wrong",
        "/?invitation=",
        "/?owner=" + TOKENS["invitation"],
        "/?invitation=%ff%00",
        "/?invitation=ü",
    ):
        answer = public.get(path)
        assert answer.status_code == 403, path
        assert not answer.cookies
    assert public.post("/start", data={"token": "x"}).status_code == 403
    assert public.post("/?invitation=" + TOKENS["invitation"], data={"a": "b"}).status_code == 403


def test_an_address_with_many_fields_is_told(public: TestClient) -> None:
    answer = public.get("/?" + "&".join(f"f{i}=1" for i in range(9)))
    assert answer.status_code == 400
    assert "at most 8 fields" in answer.text


def test_an_invitation_becomes_a_cookie_and_leaves_the_address(public: TestClient) -> None:
    link = "/?invitation=" + TOKENS["invitation"]
    answer = public.get(link, follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=lax" in answer.headers["set-cookie"]
    own = begin(public)
    assert cast(public, own, 0).status_code == 200


@pytest.mark.parametrize("path", ["//evil.example.com/", "/%5Cevil.example.com", "///x"])
def test_an_invitation_leads_to_no_other_host(public: TestClient, path: str) -> None:
    link = f"http://10.0.0.5{path}?invitation=" + TOKENS["invitation"]
    answer = public.get(link, follow_redirects=False)
    assert answer.status_code == 303
    assert re.match(r"/[^/\\]", answer.headers["location"])


def test_voters_do_not_see_results_but_their_owner_does(public: TestClient) -> None:
    public.get("/?invitation=" + TOKENS["invitation"])
    assert public.get("/").status_code == 200
    assert "/results" not in public.get("/").text
    assert public.get("/results").status_code == 403
    answer = public.get("/results?owner=" + TOKENS["owner"])
    assert answer.status_code == 200
    assert answer.url.query == b""
    assert "Nobody has voted yet" in answer.text


def test_another_servers_cookie_does_not_let_in(public: TestClient, tmp_path: Path) -> None:
    public.get("/?invitation=" + TOKENS["invitation"])
    other = Ballot(make_run(tmp_path / "other", prompts=1, seeds=1))
    with TestClient(create_app(other, tokens=TOKENS), base_url="http://10.0.0.5") as client:
        client.cookies = public.cookies
        assert client.get("/").status_code == 403


def test_images_that_have_changed_are_not_voted_on(client: TestClient, ballot: Ballot) -> None:
    begin(client)
    image = re.findall(r"/image/\w+\.png", client.get("/").text)[0]
    assert client.get(image).status_code == 200
    file = next(iter(ballot.store.read().digests))
    write_bytes(ballot.folder / file, draw("coral", "square", shaky=True, seed=999))
    with pytest.raises(FifaError, match="1 images have changed since they were voted on"):
        Ballot(ballot.folder.parent)
    ballot._pictures = Pictures(ballot.folder)
    assert client.get(image).status_code == 503


def test_comparisons_that_are_gone_are_not_voted_on(ballot: Ballot) -> None:
    run = ballot.folder.parent
    write_index(run, [row for row in read_index(run) if row["prompt_id"] != "p1"])
    with pytest.raises(FifaError, match="1 comparisons that people were asked for"):
        Ballot(run)


def test_a_later_model_is_for_new_voters(ballot: Ballot, client: TestClient) -> None:
    own = begin(client)
    cast(client, own, 0)
    run = make_run(
        ballot.folder.parent, models=("base", "tuned-secret", "more"), prompts=4, seeds=1
    )
    again = Ballot(run, Vote(checks=0.5))
    assert len(again.asked) == 12
    with TestClient(create_app(again), base_url=HERE) as later:
        later.cookies = client.cookies
        assert cast(later, own, 1).json()["total"] == 4
        later.cookies.clear()
        begin(later)
        assert "1 of 18" in later.get("/").text


def test_models_and_limit_choose_what_is_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path, models=("base", "a", "b"), prompts=5, seeds=2)
    ballot = Ballot(run, Vote(models=("b", "base"), limit=5))
    asked = [ballot.comparisons[key] for key in ballot.asked]
    assert {(one.ours, one.theirs) for one in asked} == {("b", "base")}
    assert {one.prompt_id for one in asked} == {f"p{i}" for i in range(5)}
    with pytest.raises(FifaError, match="no model 'c'"):
        Ballot(run, Vote(models=("c",)))
