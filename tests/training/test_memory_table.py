"""What fits which card: a table made from the families' rows, and on the page as it is made."""

import torch

from fifa.training.backbones.parts import shapes_in
from memory_table import KINDS, PAGE, cell, in_page, plan, table, write_headers, write_published


def test_the_page_has_the_table_that_the_script_makes():
    _, found, _ = in_page(PAGE.read_text("utf-8"))
    assert found == table(), "python scripts/memory_table.py --write"


def test_headers_tell_the_shapes_and_take_no_room(tmp_path):
    module = torch.nn.Linear(3000, 2000)
    write_headers(module, tmp_path / "model.safetensors")
    assert shapes_in(tmp_path) == {"weight": (2000, 3000), "bias": (2000,)}
    known = (tmp_path / "model.safetensors").stat()
    assert known.st_size > 2 * 2000 * 3000 > 100 * 512 * known.st_blocks


def test_a_larger_card_takes_more_pairs_and_too_small_a_one_none(tmp_path):
    from fifa.models.families import FAMILIES

    kind = KINDS[0]
    model = write_published(FAMILIES[0], tmp_path / "sd")
    assert kind.family == FAMILIES[0].name
    assert cell(plan(kind, model, 3)) == "-"
    few, many = (int(cell(plan(kind, model, card)).strip("*")) for card in (12, 80))
    assert 0 < few < many <= kind.train.batch
