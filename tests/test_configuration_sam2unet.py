import ast
import functools
import inspect
import json
from pathlib import Path

import pytest
from common import BRATS_REGIONS, small_backbone_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, Sam2HieraDetConfig

from sam2unet_hf import Sam2UNetConfig
from sam2unet_hf.regions_sam2unet import label_names, region_levels


OWN_FIELDS = sorted(set(Sam2UNetConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__))


@pytest.mark.parametrize("as_dict", [False, True], ids=["object", "dict"])
def test_config_survives_saving(tmp_path, as_dict):
    backbone = small_backbone_config()
    config = Sam2UNetConfig(
        backbone_config=backbone.to_dict() if as_dict else backbone,
        adapter_hidden_size=8,
        decoder_channels=24,
        regions=BRATS_REGIONS,
        freeze_encoder=False,
        auxiliary_loss_weights=[0.5, 0.25],
        weight_bce=True,
        iou_over_batch=True,
        ignore_index=254,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, Sam2UNetConfig)
    assert isinstance(loaded.backbone_config, Sam2HieraDetConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.id2label == {0: "background", 1: "TC without ET", 2: "WT without TC", 3: "ET"}


def test_backbone_dict_needs_no_model_type():
    assert Sam2UNetConfig(backbone_config={"hidden_size": 96}).backbone_config.hidden_size == 96


def test_number_of_channels_is_the_backbones(tmp_path):
    config = Sam2UNetConfig.from_preset("tiny", num_channels=6)
    assert config.backbone_config.num_channels == 6
    config.save_pretrained(tmp_path)
    assert Sam2UNetConfig.from_pretrained(tmp_path).backbone_config.num_channels == 6
    assert Sam2UNetConfig.from_preset("tiny").backbone_config.num_channels == 3
    with pytest.raises(StrictDataclassError, match="`backbone_config.num_channels` must be at least 1, got 0"):
        Sam2UNetConfig.from_preset("tiny", num_channels=0)


@pytest.mark.parametrize(
    ("preset", "dims", "blocks", "windows", "background"),
    [
        ("tiny", [96, 192, 384, 768], [1, 2, 7, 2], [8, 4, 14, 7], [7, 7]),
        ("small", [96, 192, 384, 768], [1, 2, 11, 2], [8, 4, 14, 7], [7, 7]),
        ("base_plus", [112, 224, 448, 896], [2, 3, 16, 3], [8, 4, 14, 7], [14, 14]),
        ("large", [144, 288, 576, 1152], [2, 6, 36, 4], [8, 4, 16, 8], [7, 7]),
    ],
)
def test_presets_are_sam2s(preset, dims, blocks, windows, background):
    backbone = Sam2UNetConfig.from_preset(preset).backbone_config
    assert backbone.embed_dim_per_stage == dims
    assert backbone.blocks_per_stage == blocks
    assert backbone.window_size_per_stage == windows
    assert backbone.window_positional_embedding_background_size == background


def test_unknown_preset_raises():
    with pytest.raises(ValueError, match="`preset` must be one of tiny, small, base_plus, large, got 'huge'"):
        Sam2UNetConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"decoder_channels": "64"}, "decoder_channels"),
        ({"decoder_channels": 0}, "`decoder_channels` must be >= 1, got 0"),
        ({"adapter_hidden_size": -1}, "`adapter_hidden_size` must be >= 1, got -1"),
        ({"boundary_kernel_size": 15}, "`boundary_kernel_size` is no longer an option, .* always takes 31, got 15"),
        (
            {"boundary_weight": 2.0},
            "`boundary_weight` is no longer an option, .* always takes 5.0, got 2.0. Remove it",
        ),
        ({"auxiliary_loss_weights": [1.0]}, r"`auxiliary_loss_weights` must be two weights .* got \[1.0\]"),
        ({"regions": {"WT": [1, 255]}, "ignore_index": 255}, "holds `ignore_index` 255, .*Leave out `ignore_index`"),
        ({"regions": {"a": [1, 2], "b": [2, 3]}}, "must be nested or disjoint"),
        ({"regions": {}}, "must name at least one region"),
        ({"regions": {"a": [0, 1]}}, "must list label ids >= 1"),
        ({"regions": {"a": []}}, "must list label ids >= 1"),
        ({"regions": {"a": [1, 2], "b": [1], "c": [2]}}, "is the union of the regions inside it"),
        ({"id2label": {0: "background"}}, r"does not name the label ids \[1\]"),
        ({"backbone_config": {"blocks_per_stage": [1, 2]}}, "must have four stages"),
        ({"backbone_config": {"window_size_per_stage": [8, 5, 14, 7]}}, "must be even but for the last stage"),
        ({"backbone_config": {"window_size_per_stage": [16, 4, 14, 7]}}, "must start with 2, 4 or 8"),
        ({"backbone_config": {"window_size_per_stage": [8, 4, 14]}}, "must have four entries"),
        ({"backbone_config": {"patch_stride": [8, 8]}}, "`backbone_config.patch_stride` must be 4"),
        ({"backbone_config": {"query_stride": [4, 4]}}, "`backbone_config.query_stride` must be 2"),
        ({"backbone_config": {"num_attention_heads_per_stage": [5, 2, 4, 8]}}, "96 is not a multiple of its 5"),
        ({"backbone_config": {"model_type": "resnet"}}, "must be a `Sam2HieraDetConfig`, got ResNetConfig"),
    ],
    ids=str,
)
def test_wrong_values_raise(fields, match):
    with pytest.raises((StrictDataclassError, ValueError), match=match):
        Sam2UNetConfig(**fields)


def test_other_regions_at_loading_get_names_of_their_own(tmp_path):
    Sam2UNetConfig(regions=BRATS_REGIONS).save_pretrained(tmp_path)
    config = Sam2UNetConfig.from_pretrained(tmp_path, regions={"liver": [3]}, ignore_index=254)
    assert config.id2label == {0: "background", 3: "liver"}
    assert config.label2id == {"background": 0, "liver": 3}
    assert config.ignore_index == 254
    named = Sam2UNetConfig.from_pretrained(tmp_path, regions={"a": [1]}, id2label={0: "none", 1: "lesion"})
    assert named.id2label == {0: "none", 1: "lesion"}
    assert named.label2id == {"none": 0, "lesion": 1}
    with pytest.raises(StrictDataclassError, match="`decoder_channels` must be >= 1, got 0"):
        Sam2UNetConfig.from_pretrained(tmp_path, decoder_channels=0)


def test_labels_that_no_region_writes_raise(tmp_path):
    Sam2UNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`num_labels` 4 does not fit .* write 2 label ids.* by `regions`"):
        Sam2UNetConfig.from_pretrained(tmp_path, num_labels=4)
    assert Sam2UNetConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "background", 1: "WT"}
    organs = {0: "background", 1: "liver", 2: "spleen"}
    for make in (Sam2UNetConfig, functools.partial(Sam2UNetConfig.from_pretrained, tmp_path)):
        with pytest.raises(StrictDataclassError, match=r"names the label ids \[2\], which .* `regions`, such as"):
            make(id2label=organs)
        assert make(id2label=organs, regions={"liver": [1], "spleen": [2]}).num_labels == 3


def test_options_that_are_gone_load_with_the_value_that_is_left(tmp_path, recwarn):
    Sam2UNetConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "boundary_kernel_size": 31, "boundary_weight": 5.0}))
    config = Sam2UNetConfig.from_pretrained(tmp_path)
    assert not recwarn.list
    assert not {"boundary_kernel_size", "boundary_weight"} & config.to_dict().keys()
    with pytest.raises(ValueError, match="`boundary_weight` is no longer an option"):
        Sam2UNetConfig.from_pretrained(tmp_path, boundary_weight=4.0)
    path.write_text(json.dumps({**fields, "boundary_weight": 2.0}))
    with pytest.raises(ValueError, match="`boundary_weight` is no longer an option, .* got 2.0. Remove it"):
        AutoConfig.from_pretrained(tmp_path)


def test_region_levels_write_as_nnunet_does():
    assert region_levels(BRATS_REGIONS) == [{"WT": 2}, {"TC": 1}, {"ET": 3}]
    assert region_levels({"ET": [3], "WT": [1, 2, 3]}) == [{"WT": 1}, {"ET": 3}]
    assert region_levels({"liver": [1], "spleen": [2]}) == [{"liver": 1, "spleen": 2}]


def test_label_names_say_what_an_outer_region_writes():
    assert label_names(BRATS_REGIONS) == {0: "background", 1: "TC without ET", 2: "WT without TC", 3: "ET"}
    assert label_names({"WT": [1, 2, 3]}) == {0: "background", 1: "WT"}
    assert label_names({"organ": [1, 2, 3], "a": [1], "b": [3]}) == {
        0: "background",
        1: "a",
        2: "organ without a, b",
        3: "b",
    }


def test_every_field_is_documented():
    documentation = inspect.getdoc(Sam2UNetConfig)
    assert [name for name in OWN_FIELDS if f"\n    {name}: " not in documentation] == []


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_every_field_is_read_by_the_model(name):
    package = Path(inspect.getfile(Sam2UNetConfig)).parent
    files = [package / f"{part}_sam2unet.py" for part in ("modeling", "encoder", "decoder", "checkpoint")]
    trees = [ast.parse(path.read_text()) for path in files]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert name in read


@pytest.mark.parametrize("names", [["WT", "TC", "ET"], ["ET", "WT", "TC"]])
def test_saving_keeps_the_order_of_the_channels(tmp_path, names):
    regions = {name: BRATS_REGIONS[name] for name in names}
    Sam2UNetConfig(regions=regions).save_pretrained(tmp_path)
    assert list(AutoConfig.from_pretrained(tmp_path).regions.items()) == list(regions.items())
