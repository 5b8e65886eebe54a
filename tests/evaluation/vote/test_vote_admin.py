"""The admin's page, the end of a vote, quotas, and several runs on one server."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient
from test_vote_app import HERE, HOSTILE, JSON, TOKENS, begin, cast, token
from vote_worlds import make_run

from fifa.config import Vote
from fifa.errors import FifaError
from fifa.evaluation.vote.app import create_app
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.export import export_votes
from fifa.evaluation.vote.serve import serve_votes
from fifa.evaluation.vote.site import Site, run_name

OWNER = {"owner": TOKENS["owner"]}
LINK = "http://10.0.0.5:8750/?invitation=" + TOKENS["invitation"]


def visitor(app: Any, path: str = "/", **query: str) -> TestClient:
    client = TestClient(app, base_url=HERE)
    client.get(path, params=query)
    return client


def test_the_admin_sees_how_far_everybody_is_and_the_link_with_its_code(tmp_path: Path) -> None:
    run = make_run(tmp_path / "fox", prompts=4, seeds=1)
    ballot = Ballot(run, Vote(votes_per_voter=3, votes_per_pair=2))
    app = create_app(ballot, tokens=TOKENS, link=LINK)
    owner, voter = visitor(app, **OWNER), visitor(app, invitation=TOKENS["invitation"])
    page = owner.get("/admin").text
    assert "<b>0</b> votes of <b>0</b> voters on <b>4</b> comparisons of fox" in page
    assert "Nobody has begun yet" in page
    assert f'value="{LINK}"' in page
    assert re.search(r'<svg [^>]*class="qr"', page)
    assert "owner=" not in page
    own = begin(voter, name=HOSTILE + "\0")
    for position in range(3):
        assert cast(voter, own, position).status_code == 200
    assert cast(voter, own, 3).status_code == 409
    assert "All your 3 votes are kept" in voter.get("/").text
    begin(visitor(app, invitation=TOKENS["invitation"]))
    page = owner.get("/admin").text
    assert "1 of 2 who began is through; at most 3 votes each" in page
    assert "0 to 1, median 1; 0 of 4 have their 2" in page
    assert 'max="3" value="3"' in page
    assert "<script>" not in page
    assert not re.search(r"\son\w+=|\sstyle=|<style", page)


def test_nobody_but_the_owner_gets_to_the_admin_page_results_and_votes(tmp_path: Path) -> None:
    ballot = Ballot(make_run(tmp_path, prompts=2, seeds=1))
    app = create_app(ballot, tokens=TOKENS)
    invited = visitor(app, invitation=TOKENS["invitation"])
    local = visitor(create_app(ballot, tokens=OWNER))
    own = begin(local)
    cast(local, own, 0)
    assert begin(invited)
    paths = ["/admin", "/votes.parquet"]
    for path in ("/results", "/admin", "/votes.parquet"):
        paths += [path + "%0A", path + "/", HERE + "/" + path, path + "%00", path + "?owner=x"]
    for path in paths:
        assert invited.get(path).status_code == 403, path
        if "results" not in path:
            assert local.get(path).status_code == 403, path
            assert visitor(create_app(ballot)).get(path).status_code == 404, path
    assert local.get("/results").status_code == 200
    assert invited.get("/results").status_code == 403
    assert visitor(app, **OWNER).get("/admin").status_code == 200
    assert visitor(create_app(ballot, tokens=OWNER), **OWNER).get("/admin").status_code == 200


def test_votes_are_downloaded_as_they_are_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prompts=3, seeds=1)
    app = create_app(Ballot(run), tokens=OWNER)
    client = visitor(app, **OWNER)
    none = client.get("/votes.parquet")
    assert none.status_code == 409
    assert "no vote counts yet" in none.text
    own = begin(client)
    for position in range(2):
        cast(client, own, position)
        got = client.get("/votes.parquet")
        assert got.headers["content-disposition"] == 'attachment; filename="votes.parquet"'
        export_votes(run, tmp_path / "votes.parquet")
        assert got.content == (tmp_path / "votes.parquet").read_bytes()
        assert len(pq.read_table(io.BytesIO(got.content))) == position + 1
    left = {path.name for path in (run / "evaluate").iterdir()} - {"images", "images.parquet"}
    assert left <= {"votes.sqlite", "votes.sqlite-shm", "votes.sqlite-wal"}


def test_after_the_end_votes_are_refused_with_a_page_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, prompts=3, seeds=1)
    soon = datetime.now(UTC) + timedelta(hours=1)
    ballot = Ballot(run, Vote(until=soon))
    client = visitor(create_app(ballot))
    assert "You can vote until" in client.get("/").text
    own = begin(client)
    cast(client, own, 0)
    ballot.until = datetime.now(UTC)
    late = cast(client, own, 1)
    assert late.status_code == 409
    assert late.json()["done"]  # upon which the script loads the page
    page = client.get("/").text
    assert "Voting has ended" in page
    assert "Your vote is kept" in page
    assert (
        client.post("/undo", data={"token": own, "position": "1"}, headers=JSON).status_code == 409
    )
    other = visitor(create_app(ballot))
    page = other.get("/").text
    assert "Voting has ended" in page
    ballot.until = soon
    own = token(visitor_page := other.get("/").text)
    assert "Start" in visitor_page
    ballot.until = datetime.now(UTC)
    assert "Voting has ended" in other.post("/start", data={"token": own}).text
    assert len(ballot.store.read().votes) == len(ballot.store.read().voters) == 1
    plain = Vote(until=datetime(2026, 12, 24, 18))
    assert Ballot(run, plain).until == datetime(2026, 12, 24, 18).astimezone()


def test_a_quota_of_pairs_lets_others_fill_what_one_leaves(tmp_path: Path) -> None:
    ballot = Ballot(make_run(tmp_path, prompts=4, seeds=1), Vote(votes_per_pair=1))
    first, second = (visitor(create_app(ballot)) for _ in range(2))
    tokens = [begin(first), begin(second)]
    for client, own in zip((first, second), tokens, strict=True):
        page = client.get("/").text
        while 'id="vote"' in page:
            position = re.search(r'name="position" value="(\d+)"', page)
            assert position
            images = re.findall(r"/image/\w+\.png", page)
            assert all(client.get(image).status_code == 200 for image in images)
            state = cast(client, own, int(position[1]), "tie").json()
            assert state["votes"] > 0
            page = client.get("/").text
    assert ballot.progress()[1] == [1] * 4
    assert sum(one.votes for one in ballot.progress()[0]) == 4
    late = visitor(create_app(ballot))
    own = token(late.get("/").text)
    assert "there is none left for you" in late.post("/start", data={"token": own}).text


@pytest.fixture
def site(tmp_path: Path) -> Site:
    ballots = [Ballot(make_run(tmp_path / name / "run", prompts=2, seeds=1)) for name in "ab"]
    named = {run_name(ballot): ballot for ballot in ballots}
    tokens = [{"invitation": c * 22, "owner": c.upper() * 22} for c in "ij"]
    return Site(named, dict(zip(named, tokens, strict=True)), origin="http://10.0.0.5:8750")


def test_several_runs_have_a_page_each_and_one_that_lists_them(site: Site) -> None:
    assert TestClient(site, base_url=HERE).get("/").status_code == 403
    for token_of in site.tokens.values():  # a run's owner is not the server's
        assert visitor(site, owner=token_of["owner"]).get("/").status_code == 403
    owner = visitor(site, owner=site.owner)
    page = owner.get("/").text
    links = re.findall(r'href="(/run-[^"]+)"', page)
    assert len(links) == 2
    for (name, tokens), link in zip(site.tokens.items(), links, strict=True):
        assert f'value="http://10.0.0.5:8750/{name}/?invitation={tokens["invitation"]}"' in page
        assert owner.get(link).url.path == f"/{name}/admin"
        assert owner.get(f"/{name}/votes.parquet").status_code == 409
    assert owner.get("/vote.css").status_code == 200
    assert owner.get("/nothing").status_code == 404
    assert owner.get("/", headers={"host": "evil.example.com"}).status_code == 421


def test_votes_of_several_runs_never_mix(site: Site) -> None:
    one, two = site.tokens
    client = visitor(site, f"/{one}", invitation=site.tokens[one]["invitation"])
    assert client.get(f"/{two}/").status_code == 403  # an invitation is to one run
    wrong = visitor(site, f"/{two}/", invitation=site.tokens[one]["invitation"])
    assert wrong.get(f"/{two}/").status_code == 403
    client.get(f"/{two}/", params={"invitation": site.tokens[two]["invitation"]})
    pages = {name: client.get(f"/{name}/").text for name in (one, two)}
    own = {name: token(page) for name, page in pages.items()}
    assert own[one] != own[two]
    for name in (one, two):
        page = client.post(f"/{name}/start", data={"token": own[name]})
        assert page.url.path == f"/{name}/"
        assert set(re.findall(r'(?:src|href|action|data-images)="(/[^/"]*)', page.text)) == {
            f"/{name}"
        }
    images = re.findall(r'src="(/\S+\.png)"', client.get(f"/{one}/").text)
    assert client.get(images[0]).status_code == 200
    assert client.get(images[0].replace(one, two)).status_code == 404
    fields = {"position": "0", "answer": "left"}
    for name, form, status in ((one, two, 403), (one, one, 200), (two, one, 403)):
        data = fields | {"token": own[form]}
        assert client.post(f"/{name}/vote", data=data, headers=JSON).status_code == status
    assert [len(ballot.store.read().votes) for ballot in site.ballots.values()] == [1, 0]
    left = client.post(f"/{one}/leave", data={"token": own[one]})
    assert 'action="/' + one + '/start"' in left.text
    assert 'id="vote"' in client.get(f"/{two}/").text


def test_a_run_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prompts=1, seeds=1)
    with pytest.raises(FifaError, match="given twice"):
        serve_votes([run, tmp_path / "x" / ".." / "run"])
