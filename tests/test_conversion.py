import copy
import functools
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import (
    BRATS_REGIONS,
    reference_config,
    reference_facts,
    reference_image,
    reference_state_dict,
    sam2_model,
    small_backbone_config,
    small_config,
)
from transformers import (
    AutoImageProcessor,
    AutoModel,
    ResNetConfig,
    ResNetModel,
    Sam2HieraDetConfig,
)

from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, convert_reference_checkpoint
from sam2unet_hf.configuration_sam2unet import PRESETS, preset_backbone_config
from sam2unet_hf.conversion import convert_checkpoint, main
from sam2unet_hf.weights_sam2unet import infer_backbone_config


# Our names -> those of the reference, and of the original SAM 2 within the encoder.
SAM2_ORIGINALS = [
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.proj_in\.", ".mlp.layers.0."),
    (r"\.mlp\.proj_out\.", ".mlp.layers.1."),
]


def original_name(name):
    """The name in SAM 2's own checkpoints of an encoder weight."""
    for pattern, replacement in SAM2_ORIGINALS:
        name = re.sub(pattern, replacement, name)
    return name


def reference_name(name):
    """The name in the reference's checkpoints of a weight of our model."""
    if name.startswith("encoder."):
        name = original_name(name.removeprefix("encoder."))
        name = re.sub(r"^blocks\.(\d+)\.adapter\.down_proj\.", r"blocks.\1.prompt_learn.0.", name)
        name = re.sub(r"^blocks\.(\d+)\.adapter\.up_proj\.", r"blocks.\1.prompt_learn.2.", name)
        return "encoder." + re.sub(r"^blocks\.(\d+)\.(?!prompt_learn)", r"blocks.\1.block.", name)
    parts = name.removeprefix("decode_head.").split(".")
    if parts[0] == "classifier":
        return f"head.{parts[-1]}"
    number = int(parts[1]) + 1
    if parts[0] == "auxiliary_classifiers":
        return f"side{number}.{parts[-1]}"
    if parts[0] == "up_blocks":
        layer = {"conv1.conv": 0, "conv1.norm": 1, "conv2.conv": 3, "conv2.norm": 4}[".".join(parts[2:4])]
        return f"up{number}.conv.double_conv.{layer}.{parts[-1]}"
    rest = ".".join(parts[2:]).replace(".norm.", ".bn.")
    for ours, theirs in (("branches.", "branch"), ("fusion.", "conv_cat."), ("shortcut.", "conv_res.")):
        rest = re.sub(f"^{ours}", theirs, rest)
    return f"rfb{number}.{rest}"


@functools.cache
def reference():
    return reference_state_dict(reference_facts()["state_dict"])


REFERENCE_CONFIG = {"regions": {"foreground": [1]}}


def assert_equal_weights(model, other):
    weights = other.state_dict()
    assert model.state_dict().keys() == weights.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def with_prefix(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def compiled_encoder(weights):
    return {name.replace("encoder.", "encoder._orig_mod.", 1): value for name, value in weights.items()}


# What training scripts save, from the weights.
LAYOUTS = {
    "bare": lambda weights: weights,
    "distributed": lambda weights: with_prefix("module.", weights),
    "compiled": lambda weights: with_prefix("_orig_mod.", weights),
    "compiled, distributed": lambda weights: with_prefix("_orig_mod.module.", weights),
    "distributed, compiled": lambda weights: with_prefix("module._orig_mod.", weights),
    "compiled encoder": compiled_encoder,
    "in an attribute": lambda weights: {"state_dict": with_prefix("net.", weights), "global_step": 3},
    **{
        name: lambda weights, name=name: {name: weights, "epoch": 30, "optimizer": {"state": {}, "param_groups": []}}
        for name in ("model", "state_dict", "model_state_dict", "net", "student")
    },
    "nested": lambda weights: {"model": {"state_dict": with_prefix("_orig_mod.", weights), "ema": 0.9}},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reference_file_gives_the_model_of_its_state_dict(tmp_path, layout):
    path = tmp_path / "SAM2UNet-30.pth"
    torch.save(layout(reference()), path)
    expected = convert_reference_checkpoint(reference(), reference_config(**REFERENCE_CONFIG))
    for source in (path, str(path)):
        model = convert_reference_checkpoint(source, reference_config(**REFERENCE_CONFIG))
        assert not model.training
        assert_equal_weights(model, expected)


def test_reference_state_dict_of_distributed_training_converts():
    wrapped = {f"module.{name}": value for name, value in reference().items()}
    model = convert_reference_checkpoint(wrapped, reference_config(**REFERENCE_CONFIG))
    assert_equal_weights(model, convert_reference_checkpoint(reference(), reference_config(**REFERENCE_CONFIG)))


def test_converted_model_survives_saving(tmp_path):
    model = convert_reference_checkpoint(reference(), reference_config(**REFERENCE_CONFIG))
    model.save_pretrained(tmp_path)
    loaded = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.inference_mode():
        image = reference_image(1, 96, 96)
        assert torch.equal(loaded(image).logits, model(image).logits)


def without(name):
    return lambda weights: weights.pop(name)


def with_shape(name, *shape):
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("rfb2.branch1.0.conv.weight"), "1 missing, such as 'decode_head.receptive_field_blocks.1.branches.1"),
        (
            without("encoder.blocks.3.prompt_learn.0.bias"),
            "1 missing, such as 'encoder.blocks.3.adapter.down_proj.bias'",
        ),
        (with_shape("extra.weight", 1), "1 unknown, such as 'extra.weight'"),
        (with_shape("head.weight", 1, 32, 1, 1), r"'decode_head.classifier.weight' has shape \(1, 32, 1, 1\) where"),
        (with_shape("side1.bias", 2), r"has shape \(2,\) where the configuration needs \(1,\)"),
    ],
    ids=["missing", "missing adapter", "unknown", "shape", "bias"],
)
def test_reference_that_does_not_fit_raises(change, match):
    weights = dict(reference())
    change(weights)
    with pytest.raises(ValueError, match=f"weights in the state dict do not fit SAM2-UNet .*{match}"):
        convert_reference_checkpoint(weights, reference_config(**REFERENCE_CONFIG))


def test_reference_of_three_channels_asks_for_three_regions():
    weights = dict(reference())
    for name in ("head", "side1", "side2"):
        weights[f"{name}.weight"] = weights[f"{name}.weight"].repeat(3, 1, 1, 1)
        weights[f"{name}.bias"] = weights[f"{name}.bias"].repeat(3)
    with pytest.raises(ValueError, match="gives 3 channels, of which .* got foreground. .* `--regions` such as"):
        convert_reference_checkpoint(weights, reference_config(**REFERENCE_CONFIG))
    model = convert_reference_checkpoint(weights, reference_config(regions=BRATS_REGIONS))
    assert model.decode_head.classifier.weight.shape[0] == 3


def test_file_with_two_models_asks_for_one(tmp_path):
    torch.save({"student": reference(), "teacher": reference()}, tmp_path / "both.pth")
    with pytest.raises(ValueError, match="both.pth holds 2 state dicts: 'student', 'teacher'. Save one of them alone"):
        convert_reference_checkpoint(tmp_path / "both.pth", reference_config(**REFERENCE_CONFIG))


def test_reference_with_the_configuration_of_another_size_raises(tmp_path):
    torch.save(reference(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="in .*small.pth do not fit SAM2-UNet with this configuration: .* missing"):
        convert_reference_checkpoint(tmp_path / "small.pth", Sam2UNetConfig.from_preset("tiny"))


def test_reference_of_no_released_size_needs_a_configuration():
    with pytest.raises(ValueError, match="of width 16 with 8 blocks, which is none of SAM 2's sizes .*tiny.*large"):
        convert_reference_checkpoint(reference())


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def write_text(path):
    path.write_text("<!DOCTYPE html>\n<p>Not found</p>")


def write_truncated(path):
    torch.save(reference(), path)
    path.write_bytes(path.read_bytes()[:20_000])


def write_truncated_legacy(path):
    torch.save(reference(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:20_000])


def write_damaged_pickle(path):
    # Makes torch's unpickler fail with an IndexError.
    path.write_bytes(b"\x80\x02.")


def write_object(path):
    torch.save({"model": reference(), "optimizer": Payload(path.with_name("executed"))}, path)


def write_plain_pickle(path):
    path.write_bytes(pickle.dumps(Payload(path.with_name("executed")), protocol=2))


DAMAGED = {
    "empty": lambda path: path.touch(),
    "text": write_text,
    "truncated": write_truncated,
    "truncated legacy": write_truncated_legacy,
    "damaged pickle": write_damaged_pickle,
    "object beside the weights": write_object,
    "plain pickle": write_plain_pickle,
}
LOADERS = {"reference": convert_reference_checkpoint, "sam2": Sam2UNetForSemanticSegmentation.from_sam2}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("write", DAMAGED.values(), ids=DAMAGED)
def test_damaged_or_unsafe_file_raises_and_runs_nothing(tmp_path, loader, write):
    path = tmp_path / "checkpoint.pth"
    write(path)
    with pytest.raises(ValueError, match="checkpoint.pth cannot be loaded as a checkpoint of tensors"):
        loader(path)
    assert not (tmp_path / "executed").exists()


def test_payload_is_one(tmp_path):
    """The file that the test above looks for appears where a pickle is trusted."""
    write_plain_pickle(tmp_path / "checkpoint.pth")
    pickle.loads((tmp_path / "checkpoint.pth").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "got"),
    [([1, 2], "list"), ({"epoch": 3}, "dict"), ({0: torch.zeros(2)}, "dict"), (torch.zeros(2), "Tensor")],
    ids=["list", "numbers", "numbered tensors", "tensor"],
)
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_file_without_state_dict_raises(tmp_path, loader, content, got):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt holds no state dict, .* but another {got}"):
        loader(tmp_path / "other.pt")


def test_foreign_state_dict_raises(tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save({"conv1.weight": torch.zeros(4, 3, 7, 7)}, path)
    with pytest.raises(ValueError, match="foreign.pt is not a reference SAM2-UNet: no key starts with 'encoder.'"):
        convert_reference_checkpoint(path)
    with pytest.raises(
        ValueError, match="foreign.pt holds no SAM 2 encoder: no key starts with 'image_encoder.trunk.'"
    ):
        Sam2UNetForSemanticSegmentation.from_sam2(path)
    torch.save({"encoder.conv1.weight": torch.zeros(4, 3, 7, 7)}, path)
    with pytest.raises(ValueError, match="foreign.pt holds no Hiera encoder"):
        convert_reference_checkpoint(path)


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_missing_file_raises(tmp_path, loader):
    with pytest.raises(FileNotFoundError, match="No checkpoint file at .*absent.pth"):
        loader(tmp_path / "absent.pth")


def preset_state_dict(preset):
    """A state dict of the reference for a preset, with values that differ from weight to weight."""
    with torch.device("meta"):
        model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(preset))
    return {
        reference_name(name): torch.full(value.shape, index, dtype=value.dtype)
        for index, (name, value) in enumerate(model.state_dict().items())
    }


def test_reference_names_of_the_fixture_are_all_told_apart():
    names = {reference_name(name) for name in Sam2UNetForSemanticSegmentation(reference_config()).state_dict()}
    expected = {name for name in reference_facts()["state_dict"] if not name.startswith("up4.")}
    assert names == expected


@pytest.mark.parametrize(
    "preset", ["tiny", *(pytest.param(preset, marks=pytest.mark.slow) for preset in PRESETS if preset != "tiny")]
)
def test_preset_is_inferred_and_every_weight_arrives(preset):
    model = convert_reference_checkpoint(preset_state_dict(preset))
    assert model.config.backbone_config.to_dict() == preset_backbone_config(preset).to_dict()
    assert model.config.regions == {"foreground": [1]}
    assert model.config.id2label == {0: "background", 1: "foreground"}
    for index, (name, value) in enumerate(model.state_dict().items()):
        assert bool((value == index).all()), name


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_inferred_from_shapes(preset):
    with torch.device("meta"):
        model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(preset))
    inferred = infer_backbone_config(model.encoder.state_dict(), "weights")
    assert inferred.to_dict() == preset_backbone_config(preset).to_dict()


@pytest.fixture(scope="module")
def sam2():
    return sam2_model("sam2")


@pytest.fixture
def sam2_folder(sam2, tmp_path):
    sam2.save_pretrained(tmp_path / "sam2")
    return tmp_path / "sam2"


def assert_has_encoder_of(model, sam2, size=(96, 128)):
    model = copy.deepcopy(model).eval()
    with torch.inference_mode():
        for block in model.encoder.blocks:
            # GELU(0) is 0, so the adapter adds nothing.
            block.adapter.up_proj.weight.zero_()
            block.adapter.up_proj.bias.zero_()
        image = torch.randn(1, 3, *size)
        expected = sam2.vision_encoder.backbone(image).intermediate_hidden_states
        for ours, theirs in zip(model.encoder(image), expected, strict=True):
            theirs = theirs.permute(0, 3, 1, 2)
            assert theirs.abs().max() > 0.1
            torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1, theirs.abs().max().item()), rtol=0)


@pytest.mark.parametrize("max_shard_size", ["5GB", "500KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("kind", ["sam2", "sam2_video"])
def test_from_sam2_folder_has_its_encoder(tmp_path, kind, max_shard_size):
    original = sam2_model(kind)
    original.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == kind
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "500KB")
    model = Sam2UNetForSemanticSegmentation.from_sam2(str(tmp_path), regions=BRATS_REGIONS, adapter_hidden_size=8)
    assert model.config.regions == BRATS_REGIONS
    assert model.encoder.blocks[0].adapter.down_proj.out_features == 8
    assert not model.encoder.blocks[0].attn.qkv.weight.requires_grad
    assert_has_encoder_of(model, original)


def test_from_sam2_in_half_precision_gives_float32(sam2, tmp_path):
    half = copy.deepcopy(sam2).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    model = Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_has_encoder_of(model, half.float())


@torch.no_grad()
def assert_equal_channels_give_the_same(model, three, size=(96, 64)):
    """An image that is the same in all channels gives what it gives in three.

    In double precision, so that only the rounding of the weights shows, not that of the sums over other numbers.
    """
    grey = torch.randn(2, 1, *size, dtype=torch.float64)
    found, expected = (
        copy.deepcopy(m)
        .double()
        .eval()(grey.expand(-1, m.config.backbone_config.num_channels, -1, -1), output_hidden_states=True)
        for m in (model, three)
    )
    torch.testing.assert_close(found.logits.sigmoid(), expected.logits.sigmoid(), atol=1e-6, rtol=0)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6 * max(1, theirs.abs().max().item()), rtol=0)


@pytest.mark.parametrize("num_channels", [1, 2, 6, 12])
def test_from_sam2_inflates_the_patch_embedding(sam2_folder, num_channels):
    torch.manual_seed(0)
    three = Sam2UNetForSemanticSegmentation.from_sam2(sam2_folder)
    torch.manual_seed(0)
    model = Sam2UNetForSemanticSegmentation.from_sam2(sam2_folder, num_channels=num_channels)
    assert model.config.backbone_config.num_channels == num_channels
    weight, original = (m.encoder.patch_embed.projection.weight for m in (model, three))
    assert weight.shape == (16, num_channels, 7, 7)
    torch.testing.assert_close(weight[:, 0] * num_channels, original.sum(dim=1))
    model.decode_head.load_state_dict(three.decode_head.state_dict())
    for block, other in zip(model.encoder.blocks, three.encoder.blocks, strict=True):
        block.adapter.load_state_dict(other.adapter.state_dict())
    assert_equal_channels_give_the_same(model, three)
    # The number may come with the configuration, too.
    backbone_config = small_backbone_config(num_channels=num_channels)
    for given in (backbone_config, backbone_config.to_dict()):
        other = Sam2UNetForSemanticSegmentation.from_sam2(sam2_folder, backbone_config=given)
        assert torch.equal(other.encoder.patch_embed.projection.weight, weight)
    assert backbone_config.num_channels == num_channels


def test_from_sam2_with_three_channels_loads_the_weights_as_they_are(sam2, sam2_folder):
    for options in ({}, {"num_channels": 3}):
        model = Sam2UNetForSemanticSegmentation.from_sam2(sam2_folder, **options)
        for name, weight in sam2.vision_encoder.backbone.state_dict().items():
            assert torch.equal(model.encoder.state_dict()[name], weight), name


def test_from_sam2_without_channels_raises(sam2_folder):
    with pytest.raises(ValueError, match="`num_channels` must be at least 1, got 0"):
        Sam2UNetForSemanticSegmentation.from_sam2(sam2_folder, num_channels=0)


def test_reference_is_inflated_for_more_channels(tmp_path):
    three = convert_reference_checkpoint(reference(), reference_config(**REFERENCE_CONFIG))
    model = convert_reference_checkpoint(reference(), reference_config(num_channels=6, **REFERENCE_CONFIG))
    assert_equal_channels_give_the_same(model, three)
    torch.save(preset_state_dict("tiny"), tmp_path / "reference.pth")
    model = convert_reference_checkpoint(tmp_path / "reference.pth", num_channels=4)
    assert model.config.backbone_config.num_channels == 4
    assert model.encoder.patch_embed.projection.weight.shape[1] == 4


def original_checkpoint(sam2):
    """The file that Meta distributes: encoder, neck and the rest under `model`."""
    trunk = sam2.vision_encoder.backbone.state_dict()
    weights = {f"image_encoder.trunk.{original_name(name)}": value for name, value in trunk.items()}
    weights["image_encoder.neck.convs.0.conv.weight"] = torch.zeros(4)
    weights["memory_encoder.out_proj.bias"] = torch.zeros(4)
    return {"model": weights}


@pytest.mark.parametrize("prefix", ["", "module."], ids=["as distributed", "fine-tuned on several devices"])
def test_from_original_sam2_file_has_its_encoder(sam2, tmp_path, prefix):
    checkpoint = original_checkpoint(sam2)
    for name in ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.5.mlp.layers.1.bias", "pos_embed_window"):
        assert f"image_encoder.trunk.{name}" in checkpoint["model"]
    checkpoint["model"] = {prefix + name: value for name, value in checkpoint["model"].items()}
    torch.save(checkpoint, tmp_path / "sam2_hiera.pt")
    model = Sam2UNetForSemanticSegmentation.from_sam2(
        tmp_path / "sam2_hiera.pt", backbone_config=small_backbone_config(), regions=BRATS_REGIONS
    )
    assert_has_encoder_of(model, sam2)


def test_from_original_sam2_file_infers_the_preset(tmp_path):
    backbone_config = preset_backbone_config("tiny")
    original = sam2_model("sam2", backbone_config)
    torch.save(original_checkpoint(original), tmp_path / "sam2_hiera_tiny.pt")
    model = Sam2UNetForSemanticSegmentation.from_sam2(tmp_path / "sam2_hiera_tiny.pt")
    assert model.config.backbone_config.to_dict() == backbone_config.to_dict()
    assert_has_encoder_of(model, original)


def test_original_sam2_file_of_no_released_size_raises(sam2, tmp_path):
    torch.save(original_checkpoint(sam2), tmp_path / "small.pt")
    with pytest.raises(ValueError, match="small.pt holds a Hiera encoder of width 16 with 6 blocks, which is none of"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path / "small.pt")


def test_sam2_of_another_size_than_asked_raises(sam2, sam2_folder):
    wider = small_backbone_config(hidden_size=32, embed_dim_per_stage=[32, 64, 128, 256])
    torch.save(original_checkpoint(sam2), sam2_folder / "original.pt")
    for source in (sam2_folder, sam2_folder / "original.pt"):
        with pytest.raises(ValueError, match="do not fit an encoder of width 32 .*has shape"):
            Sam2UNetForSemanticSegmentation.from_sam2(source, backbone_config=wider)


MISSING = "blocks.2.attn.qkv.bias"


@pytest.mark.parametrize("layout", ["folder", "original"])
def test_sam2_with_a_missing_key_raises(sam2, tmp_path, layout):
    if layout == "folder":
        weights = {name: value for name, value in sam2.state_dict().items() if not name.endswith(MISSING)}
        sam2.save_pretrained(tmp_path, state_dict=weights)
        source = tmp_path
    else:
        checkpoint = original_checkpoint(sam2)
        del checkpoint["model"][f"image_encoder.trunk.{MISSING}"]
        torch.save(checkpoint, tmp_path / "original.pt")
        source = tmp_path / "original.pt"
    with pytest.raises(ValueError, match=f"do not fit an encoder of width 16 .*: 1 missing, such as '{MISSING}'"):
        Sam2UNetForSemanticSegmentation.from_sam2(source, backbone_config=small_backbone_config())


def test_folder_of_another_model_raises(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])
    ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'resnet', not a SAM 2 with a Hiera encoder"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)


def test_sam2_unet_folder_is_no_sam2(tmp_path):
    Sam2UNetForSemanticSegmentation(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'sam2unet', not a SAM 2"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)


def test_code_in_a_foreign_folder_never_runs(tmp_path):
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "configuration_foreign.ForeignConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    executed = tmp_path / "executed"
    (tmp_path / "configuration_foreign.py").write_text(f"open({str(executed)!r}, 'w').close()")
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)
    assert not executed.exists()


def test_folder_without_config_raises(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises((OSError, ValueError), match="config.json"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)


def test_folder_without_weights_raises(sam2, tmp_path):
    sam2.config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)


def test_folder_with_the_weights_of_another_model_raises(sam2, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])
    ResNetModel(config).save_pretrained(tmp_path)
    sam2.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no SAM 2 encoder: no key starts with 'vision_encoder.backbone.'"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)


def test_truncated_safetensors_raises(sam2_folder):
    weights = sam2_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged \(.*\). Download or copy it again"):
        Sam2UNetForSemanticSegmentation.from_sam2(sam2_folder)


def test_missing_shard_raises(sam2, tmp_path):
    sam2.save_pretrained(tmp_path, max_shard_size="5MB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[-1].unlink()
    with pytest.raises(OSError, match=shards[-1].name):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path)


def test_missing_folder_raises(tmp_path):
    with pytest.raises(OSError, match="absent"):
        Sam2UNetForSemanticSegmentation.from_sam2(tmp_path / "absent")


def test_hub_id_that_is_not_cached_raises_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError,
        match="no folder facebook/sam2-hiera-none, and none could be fetched from the Hub: HF_HUB_OFFLINE is set",
    ):
        Sam2UNetForSemanticSegmentation.from_sam2("facebook/sam2-hiera-none")


def test_config_as_on_the_hub_is_read(sam2_folder):
    """`facebook/sam2-hiera-*` nest the encoder like this and leave out fields that newer versions write."""
    backbone = small_backbone_config()
    config = {
        "architectures": ["Sam2VideoModel"],
        "model_type": "sam2_video",
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                **{
                    name: getattr(backbone, name)
                    for name in (
                        "blocks_per_stage",
                        "embed_dim_per_stage",
                        "global_attention_blocks",
                        "hidden_size",
                        "num_attention_heads",
                        "num_attention_heads_per_stage",
                        "window_positional_embedding_background_size",
                        "window_size_per_stage",
                    )
                },
            },
        },
    }
    (sam2_folder / "config.json").write_text(json.dumps(config))
    model = Sam2UNetForSemanticSegmentation.from_sam2(sam2_folder)
    assert isinstance(model.config.backbone_config, Sam2HieraDetConfig)
    assert model.config.backbone_config.window_size_per_stage == [8, 4, 14, 7]
    assert model.config.regions == {"WT": [1, 2, 3]}


@pytest.mark.parametrize("name", ["SAM2UNet-30.pth", "checkpoint.pth.tar", "last.ckpt"])
def test_command_line_converts_a_reference_file(tmp_path, capsys, name):
    source = tmp_path / name
    torch.save({"model_state_dict": preset_state_dict("tiny"), "epoch": 30}, source)
    with pytest.raises(SystemExit) as exit_info:
        main([str(source), str(tmp_path / "new" / "model")])
    assert exit_info.value.code == 0
    assert "segments foreground" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    model = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path / "new" / "model")
    assert_equal_weights(model, convert_reference_checkpoint(source))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "new" / "model")
    assert list(processor.regions) == ["foreground"]


def large_reference_shapes():
    """The names and shapes of the reference with SAM 2's large encoder, from those of the fixture's small one."""
    small = reference_facts()["state_dict"]
    dims = [144, 288, 576, 1152]
    shapes = {}
    for name, shape in small.items():
        if name.startswith("encoder.blocks."):
            continue
        if name.startswith("encoder."):
            # Position and patch embeddings, 16 channels wide.
            shape = [144 if size == 16 else size for size in shape]
        elif re.match(r"rfb\d\.(branch\d\.0|conv_res)\.conv\.weight", name):
            shape = [shape[0], dims[int(name[3]) - 1], *shape[2:]]
        shapes[name] = shape
    # In the fixture's last stage block 6 widens 64 channels to 128, and block 7 keeps them. The adapters are 32 wide.
    stages = [stage for stage, count in enumerate([2, 6, 36, 4]) for _ in range(count)]
    for block, stage in enumerate(stages):
        widens = stage > 0 and stages[block - 1] < stage
        prefix = f"encoder.blocks.{6 if widens else 7}."
        for name, shape in small.items():
            if name.startswith(prefix):
                new_shape = [size if size == 32 else size * dims[stage] // 128 for size in shape]
                shapes[f"encoder.blocks.{block}.{name.removeprefix(prefix)}"] = new_shape
    return shapes


# Between the tests and the command, because a process starts with the peak memory of the one that starts it.
MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_command_line_converts_the_large_reference_in_3_gb(tmp_path, record_property):
    weights = reference_state_dict(large_reference_shapes())
    source, output = tmp_path / "SAM2UNet-large.pth", tmp_path / "new" / "model"
    torch.save(weights, source)
    command = [sys.executable, "-m", "sam2unet_hf.conversion", str(source), str(output)]
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        cwd=Path(__file__).parents[1],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds, peak = map(float, process.stdout.split())
    peak_bytes = peak * (1 if sys.platform == "darwin" else 1024)
    record_property("seconds", seconds)
    record_property("peak_bytes", peak_bytes)
    assert peak_bytes < 3e9
    assert [path.name for path in output.parent.iterdir()] == ["model"]

    model = AutoModel.from_pretrained(output)
    state_dict = model.state_dict()
    assert {reference_name(name) for name in state_dict} == {name for name in weights if not name.startswith("up4.")}
    for name, value in state_dict.items():
        assert torch.equal(value, weights[reference_name(name)]), name
    image = reference_image(1, 96, 128)
    with torch.inference_mode():
        logits = model(image).logits
        assert logits.std() > 0.1
        assert torch.equal(logits, convert_reference_checkpoint(weights)(image).logits)


def test_command_line_converts_a_sam2_encoder(sam2, sam2_folder, tmp_path, capsys):
    output = tmp_path / "model"
    with pytest.raises(SystemExit) as exit_info:
        main([str(sam2_folder), str(output), "--regions", "WT=1,2,3", "TC=1,3", "ET=3"])
    assert exit_info.value.code == 0
    model = AutoModel.from_pretrained(output)
    assert model.config.regions == BRATS_REGIONS
    assert_has_encoder_of(model, sam2)
    assert AutoImageProcessor.from_pretrained(output).regions == BRATS_REGIONS


def test_command_line_converts_for_more_channels(sam2_folder, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main([str(sam2_folder), str(tmp_path / "model"), "--num_channels", "6"])
    assert exit_info.value.code == 0
    model = AutoModel.from_pretrained(tmp_path / "model")
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "model")(torch.ones(80, 70), return_tensors="pt")
    with torch.inference_mode():
        assert model(inputs["pixel_values"][..., :64, :64]).logits.shape == (1, 1, 64, 64)
    assert inputs["pixel_values"].shape == (1, 6, 352, 352)


def test_help_tells_the_default_regions_of_each_kind_of_source(sam2_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    torch.save(preset_state_dict("tiny"), tmp_path / "reference.pth")
    for source, kind in ((tmp_path / "reference.pth", "reference .pth file"), (sam2_folder, "SAM 2 encoder")):
        ((name, label_ids),) = convert_checkpoint(source, tmp_path / kind).config.regions.items()
        assert f"{name}={','.join(map(str, label_ids))} for a {kind}" in text


def test_conversion_is_undone_if_it_does_not_load_as_written(sam2_folder, tmp_path, monkeypatch):
    save = Sam2UNetForSemanticSegmentation.save_pretrained

    def save_another(model, folder):
        model = copy.deepcopy(model)
        model.decode_head.classifier.bias.data += 1
        save(model, folder)

    monkeypatch.setattr(Sam2UNetForSemanticSegmentation, "save_pretrained", save_another)
    with pytest.raises(RuntimeError, match="1 weights, such as 'decode_head.classifier.bias', were not read back"):
        convert_checkpoint(sam2_folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["sam2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pth", "model"], "No checkpoint file at absent.pth"),
        (["sam2", "."], r"\. exists and is not an empty folder"),
        (["sam2", "model", "--regions", "WT"], "Regions are NAME=ID.*got 'WT'"),
        (
            ["reference.pth", "model", "--regions", "WT=1,2", "TC=1"],
            "reference.pth gives 1 channel, of which .* got WT, TC",
        ),
        (["reference.pth", "model", "--revision", "main"], "`revision` is for the Hub, but reference.pth is a file"),
    ],
)
def test_command_line_refuses(sam2_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "reference.pth" in arguments:
        torch.save(preset_state_dict("tiny"), "reference.pth")
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("model").exists()


def test_configuration_and_fields_of_one_raise():
    with pytest.raises(TypeError, match="got both: regions"):
        convert_reference_checkpoint(reference(), reference_config(), regions={"lesion": [1]})
