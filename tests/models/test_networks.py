"""Networks have all their weights and no others, but for heads that nobody asked for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from fifa.errors import FifaError
from fifa.models.networks import load_network, loading, named_keys


@pytest.fixture
def bert(tmp_path):
    """Writes a BERT with its head, some of its weights changed; gives the folder."""
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=9,
        max_position_embeddings=8,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)

    def write(more=(), but=()):
        file = tmp_path / "model.safetensors"
        weights = {key: w for key, w in load_file(file).items() if key not in but}
        save_file({**weights, **{key: torch.zeros(2) for key in more}}, file, {"format": "pt"})
        return tmp_path

    return write


def test_another_head_is_left_out_and_a_pooler_may_lack(bert):
    network = load_network(BertModel, bert(["bert.embeddings.position_ids"]), torch.bfloat16)
    assert network.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["bert.encoder.layer.2.output.dense.bias", "embeddings.more"])
def test_a_layer_that_the_config_does_not_have_is_refused(bert, key):
    with pytest.raises(FifaError, match=rf"1 unused \({key}\)"):
        load_network(BertModel, bert([key]), torch.float32)


def test_what_is_missing_is_named(bert):
    key = "bert.encoder.layer.1.output.dense.bias"
    with pytest.raises(FifaError, match=r"1 missing \(encoder\.layer\.1\.output\.dense\.bias\)"):
        load_network(BertModel, bert(but=[key]), torch.float32)


def test_pickled_weights_stay_closed(bert):
    folder = bert()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FifaError, match="no safetensors"):
        load_network(BertModel, folder, torch.float32)


def test_few_keys_of_many_are_named():
    assert named_keys(missing=[], unused="cab") == "3 unused (a, b, c)"
    assert named_keys(missing="a", unused="dcba") == "1 missing (a); 4 unused (a, b, c, ...)"


def test_memory_that_runs_out_is_not_the_files_fault(tmp_path):
    with pytest.raises(MemoryError), loading("it", tmp_path):
        raise MemoryError
    with (
        pytest.raises(FifaError, match="cannot load it: 'x'"),
        loading("it", tmp_path),
    ):
        raise KeyError("x")
