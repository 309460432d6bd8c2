"""Configurations of towers, and the registry of architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from open_clip import config
from open_clip.config import CLIPTextCfg, CLIPVisionCfg, MultimodalCfg, as_config


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove models that a test registered."""
    config.list_models()
    monkeypatch.setattr(config, "_registry", dict(config._registry))
    monkeypatch.setattr(config, "MODEL_CONFIG_PATHS", list(config.MODEL_CONFIG_PATHS))


def tiny(**changes: object) -> dict:
    return {"embed_dim": 8, "vision_cfg": {"width": 16}, "text_cfg": {"width": 16}, **changes}


def test_all_bundled_architectures_are_listed_in_natural_order() -> None:
    names = config.list_models()
    assert len(names) == 154
    assert names[:3] == ["coca_base", "coca_roberta-ViT-B-32", "coca_ViT-B-32"]
    assert names.index("EVA02-B-16") < names.index("ViT-B-16") < names.index("ViT-B-16-plus") < names.index("ViT-B-32")


def test_every_bundled_architecture_has_only_known_keys() -> None:
    for name in config.list_models():
        cfg = config.get_model_config(name)
        assert cfg is not None
        assert as_config(CLIPVisionCfg, cfg["vision_cfg"]).width > 0, name
        assert as_config(CLIPTextCfg, cfg["text_cfg"]).width > 0, name
        if "multimodal_cfg" in cfg:
            assert as_config(MultimodalCfg, cfg["multimodal_cfg"]).layers > 0, name


def test_configurations_are_deep_copies() -> None:
    first = config.get_model_config("ViT-B-32")
    assert first is not None
    first["vision_cfg"]["width"] = 1
    second = config.get_model_config("ViT-B-32")
    assert second is not None
    assert second["vision_cfg"]["width"] == 768


def test_unknown_architecture_is_none() -> None:
    assert config.get_model_config("ViT-B-33") is None


def test_an_unknown_key_raises_and_names_the_most_similar() -> None:
    with pytest.raises(ValueError, match=r"'patch_sise' \(did you mean 'patch_size'\?\).*typo"):
        as_config(CLIPVisionCfg, {"patch_sise": 32})
    with pytest.raises(ValueError, match=r"no 'zzz' \(no field is similar"):
        as_config(CLIPTextCfg, {"zzz": 1})


def test_as_config_returns_a_dataclass_unchanged_and_raises_for_other_types() -> None:
    cfg = CLIPVisionCfg(width=12)
    assert as_config(CLIPVisionCfg, cfg) is cfg
    with pytest.raises(ValueError, match="from a mapping, got list"):
        as_config(CLIPVisionCfg, ["width"])  # type: ignore[arg-type]


def test_closest_ignores_case() -> None:
    assert config.closest("vit-b32", config.list_models())[0] == "ViT-B-32"


@pytest.mark.usefixtures("registry")
def test_a_file_and_a_folder_of_configurations_can_be_added(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "one.json").write_text(json.dumps(tiny()))
    (tmp_path / "folder" / "ViT-B-2.json").write_text(json.dumps(tiny(embed_dim=9)))
    (tmp_path / "folder" / "notes.json").write_text("[1, 2]")
    config.add_model_config([tmp_path / "one.json", tmp_path / "folder"])
    names = config.list_models()
    assert names.index("ViT-B-2") < names.index("ViT-B-16")
    assert config.get_model_config("ViT-B-2") == tiny(embed_dim=9)
    assert config.get_model_config("one") == tiny()
    assert "notes" not in names


@pytest.mark.usefixtures("registry")
def test_an_added_configuration_replaces_one_with_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "ViT-B-32.json").write_text(json.dumps(tiny()))
    config.add_model_config(str(tmp_path / "ViT-B-32.json"))
    assert config.get_model_config("ViT-B-32") == tiny()
    assert len(config.list_models()) == 154


def test_adding_a_missing_file_or_another_json_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model configuration at"):
        config.add_model_config(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text(json.dumps({"embed_dim": 3}))
    with pytest.raises(ValueError, match="not a model configuration: it needs"):
        config.add_model_config(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32", (None, "ViT-B-32")),
        ("hf-hub:org/model", ("hf-hub", "org/model")),
        ("local-dir:/a/b", ("local-dir", "/a/b")),
        ("other:thing", (None, "other:thing")),
    ],
)
def test_parse_model_name(name: str, expected: tuple[str | None, str]) -> None:
    assert config.parse_model_name(name) == expected


def test_a_prefix_without_a_name_raises() -> None:
    with pytest.raises(ValueError, match="names nothing after 'hf-hub:'"):
        config.parse_model_name("hf-hub:")
