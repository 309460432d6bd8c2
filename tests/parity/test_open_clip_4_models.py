"""The models of open_clip's main branch: built with the facts recorded there, or refused with a sentence."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch

import main_models
import open_clip
from open_clip import config, create_model, get_model_config, get_tokenizer, list_models
from open_clip.checkpoint import mismatch
from training import profiler

PROFILES = main_models.PROFILES


@functools.cache
def recorded_state_dicts() -> dict[str, Any]:
    return main_models.state_dicts()


def test_there_are_ten_new_models_and_27_refused_ones() -> None:
    assert len(main_models.BUILT) == 10
    assert len(main_models.REFUSED) == 27
    assert set(main_models.BUILT) <= set(list_models())
    assert not set(main_models.REFUSED) & set(list_models())


@pytest.mark.parametrize("name", main_models.BUILT)
def test_state_dict_class_and_context_length(name: str) -> None:
    model = create_model(name, device="meta", load_weights=False)
    layout = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in
              model.state_dict().items()}  # fmt: skip
    assert layout == recorded_state_dicts()[name]
    assert type(model).__name__ == PROFILES[name]["class"]
    assert model.context_length == PROFILES[name]["context_length"]


@pytest.mark.parametrize("name", main_models.BUILT)
def test_parameters_and_flops(name: str) -> None:
    row, facts = profiler.profile_model(name), PROFILES[name]
    side = row["image_size"]
    assert f"3 x {side} x {side}" == facts["image_input"]
    assert row["mparams"] == round(facts["params"] / 1e6, 2)
    assert row["image_mparams"] == round(facts["params_visual"] / 1e6, 2)
    if "params_text" in facts:
        assert row["text_mparams"] == round(facts["params_text"] / 1e6, 2)
    for key in ("gflops", "image_gflops", "text_gflops"):
        # the recorded numbers are rounded, and `gflops` is their sum before or after rounding
        assert row[key] == pytest.approx(facts[key], abs=0.0101), key


@pytest.mark.parametrize("name", main_models.BUILT)
def test_a_checkpoint_is_recognized_by_the_configuration(name: str) -> None:
    """An error about a checkpoint of another model suggests this architecture."""
    weights = {key: torch.empty(shape, device="meta") for key, (shape, _) in recorded_state_dicts()[name].items()}
    facts = mismatch.facts_of_weights(weights)
    assert facts == mismatch.facts_of_config(get_model_config(name) or {})
    if "text_arch" in (get_model_config(name) or {})["text_cfg"]:
        assert facts["text tower"] == "modern"
        assert facts["text layers"] == 12


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2-naflex", "ViT-SO400M-16-SigLIP2-naflex"])
def test_entries_of_the_registry(name: str) -> None:
    path = main_models.FIXTURES / "pretrained_changes.json"
    changes = json.loads(path.read_text(encoding="utf-8"))
    entry = open_clip.get_pretrained_cfg(name, "webli")
    assert json.loads(json.dumps(entry)) == changes["new"][name]["webli"]
    assert open_clip.list_pretrained_tags_by_model(name) == ["webli"]


def test_weights_of_openai_keep_the_url_of_3_3_0() -> None:
    """The main branch removed these URLs. Here both sources can be used."""
    path = main_models.FIXTURES / "pretrained_changes.json"
    changed = json.loads(path.read_text(encoding="utf-8"))["changed"]
    assert sum(len(tags) for tags in changed.values()) == 18
    for name, tags in changed.items():
        for tag, values in tags.items():
            entry = json.loads(json.dumps(open_clip.get_pretrained_cfg(name, tag)))
            assert entry == values["is"] | values["was_in_3.3.0"]


def test_audio_weights_are_not_listed() -> None:
    assert not [model for model, _ in open_clip.list_pretrained() if model.startswith("CLAP")]


REFUSALS = {"CLAP-": "an audio", "naflexclap_": "an audio", "naflexgenlip_": "a generative", "naflexgenlap_": "a gener"}


@pytest.mark.parametrize("name", main_models.REFUSED)
def test_audio_and_generative_models_are_refused(name: str) -> None:
    (kind,) = [text for prefix, text in REFUSALS.items() if name.startswith(prefix)]
    sentence = rf"{name} is {kind}\w* model of open_clip's main branch, not supported yet\. .*\.$"
    for function in (create_model, get_tokenizer, get_model_config, profiler.profile_model):
        with pytest.raises(NotImplementedError, match=sentence):
            function(name)
    assert issubclass(NotImplementedError, RuntimeError)  # which open_clip raises for unknown names


def test_the_commands_refuse_them_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profiler.main(["--model", "ViT-B-32,CLAP-HTSAT-tiny"])
    assert "CLAP-HTSAT-tiny is an audio model of open_clip's main branch" in capsys.readouterr().err


def test_a_registered_configuration_of_this_name_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config._models(), "CLAP-HTSAT-tiny", get_model_config("RN50"))
    assert get_model_config("CLAP-HTSAT-tiny") == get_model_config("RN50")
    assert create_model("CLAP-HTSAT-tiny", device="meta") is not None
