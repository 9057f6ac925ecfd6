"""Checkpoints: whole, without the encoder, in shards, in a folder of a repository, and damaged."""

import json
import pickle
import re
import shutil
from pathlib import Path

import forks
import pytest
import torch
from common import BRATS_REGIONS, randomize, sam2_model, small_config, small_model
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSemanticSegmentation, TrainingArguments

from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.encoder_source_sam2unet import encoder_sha256
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationTransform


ROOT = Path(__file__).parent.parent
IMAGE = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sam2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam2")
    sam2_model("sam2").save_pretrained(folder)
    return folder


@pytest.fixture
def model(sam2_folder):
    """A fine-tuned model: SAM 2's encoder, all else random."""
    return fine_tuned(sam2_folder)


def fine_tuned(source, **kwargs):
    torch.manual_seed(1)
    model = Sam2UNetForSemanticSegmentation.from_sam2(source, regions=BRATS_REGIONS, **kwargs).eval()
    randomize(model.decode_head)
    for block in model.encoder.blocks:
        randomize(block.adapter)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(IMAGE.to(model.dtype)).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


# Without the encoder


def test_a_small_checkpoint_holds_what_was_trained_and_loads_bit_equal(model, sam2_folder, tmp_path):
    model.save_pretrained(tmp_path, trainable_only=True)
    names = set(load_file(tmp_path / "model.safetensors"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in model.named_buffers() if "norm" in name}
    assert statistics
    assert names == trained | statistics
    assert config_of(tmp_path)["encoder_source"] == str(sam2_folder)
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation, Sam2UNetForSemanticSegmentation):
        loaded = auto_class.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
        assert loaded.name_or_path == str(tmp_path)


def test_a_small_checkpoint_of_many_channels_fetches_and_inflates_its_encoder(sam2_folder, tmp_path):
    model = fine_tuned(sam2_folder, num_channels=6)
    model.save_pretrained(tmp_path, trainable_only=True)
    assert not any("patch_embed" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path)
    image = torch.randn(1, 6, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded(image).logits, model(image).logits)


def test_a_small_checkpoint_of_a_small_checkpoint_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "first", trainable_only=True)
    loaded = AutoModel.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second", trainable_only=True)
    first, second = config_of(tmp_path / "first"), config_of(tmp_path / "second")
    assert first["encoder_sha256"] is not None
    assert all(first[name] == second[name] for name in first if name.startswith("encoder_"))
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()
    loaded.save_pretrained(tmp_path / "whole")
    assert config_of(tmp_path / "whole")["encoder_sha256"] is None
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "whole")), logits(model))


def test_the_hash_is_that_of_the_weights_whatever_the_file(model):
    first = encoder_sha256(model.encoder.state_dict())
    assert re.fullmatch("[0-9a-f]{64}", first)
    backwards = dict(reversed(model.encoder.state_dict().items()))
    assert encoder_sha256(backwards) == first
    name = next(iter(backwards))
    assert encoder_sha256({**backwards, name: backwards[name].clone().index_fill_(0, torch.tensor(0), 7.0)}) != first
    assert encoder_sha256({**backwards, name: backwards[name].double()}) != first


def test_a_path_of_this_machine_is_written_only_where_it_is_needed(model, sam2_folder, tmp_path):
    model.save_pretrained(tmp_path)
    assert str(sam2_folder) not in (tmp_path / "config.json").read_text()
    assert model.config.encoder_source == str(sam2_folder)
    with pytest.raises(ValueError, match="which nobody else can reach. Set `model.config.encoder_source` to a Hub id"):
        model.push_to_hub("tester/model", trainable_only=True)
    with pytest.raises(ValueError, match="which nobody else can reach"):
        model.save_pretrained(tmp_path, trainable_only=True, push_to_hub=True)
    args = TrainingArguments(
        tmp_path / "run", use_cpu=True, remove_unused_columns=False, report_to="none", push_to_hub=True
    )
    with pytest.raises(ValueError, match="which nobody else can reach"):
        Sam2UNetTrainer(model, args, trainable_only=True)


def test_a_relative_path_is_one_of_this_machine_too(model, sam2_folder, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "small", trainable_only=True)
    monkeypatch.chdir(sam2_folder.parent)
    loaded = AutoModel.from_pretrained(tmp_path / "small", encoder_source=sam2_folder.name)
    with pytest.raises(ValueError, match="which nobody else can reach"):
        loaded.push_to_hub("tester/model", trainable_only=True)
    loaded.save_pretrained(tmp_path / "whole")
    assert config_of(tmp_path / "whole")["encoder_source"] is None
    loaded.save_pretrained(tmp_path / "again", trainable_only=True)
    assert config_of(tmp_path / "again")["encoder_source"] == str(sam2_folder)


def test_a_process_that_does_not_write_checks_nothing(tmp_path):
    # As the other ranks of a distributed run call it.
    model = small_model()
    model.save_pretrained(tmp_path, is_main_process=False, state_dict={})
    model.save_pretrained(tmp_path, is_main_process=False, state_dict={}, trainable_only=True)
    assert not [*tmp_path.iterdir()]


def test_a_whole_checkpoint_keeps_its_own_encoder(model, tmp_path):
    model.save_pretrained(tmp_path / "small", trainable_only=True)
    loaded = AutoModel.from_pretrained(tmp_path / "small")
    assert loaded.config.encoder_sha256 is not None
    with torch.no_grad():
        loaded.encoder.blocks[0].mlp.proj_in.bias += 1
    loaded.save_pretrained(tmp_path / "whole")
    again = AutoModel.from_pretrained(tmp_path / "whole", config=loaded.config)
    assert torch.equal(logits(again), logits(loaded))
    assert again.config.encoder_sha256 is None
    # Neither is a state dict replaced.
    with pytest.raises(ValueError, match="`state_dict` cannot be passed together with a model name"):
        Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path / "small", state_dict=loaded.state_dict())


def test_without_a_source_the_encoder_stays_in(tmp_path):
    with pytest.raises(ValueError, match="Build the model with `from_sam2`, set `model.config.encoder_source`"):
        small_model().save_pretrained(tmp_path, trainable_only=True)


def test_an_encoder_that_was_trained_stays_in(model, tmp_path):
    with torch.no_grad():
        model.encoder.blocks[2].attn.qkv.bias[3] += 1e-6
    with pytest.raises(
        ValueError, match=r"is not the one in .*: 'blocks.2.attn.qkv.bias' differs.*save the whole model"
    ):
        model.save_pretrained(tmp_path, trainable_only=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_missing_encoder_is_asked_for_and_can_be_given(sam2_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(sam2_folder, tmp_path / "sam2")
    model = fine_tuned(tmp_path / "sam2")
    model.save_pretrained(tmp_path / "small", trainable_only=True)
    (tmp_path / "sam2").rename(moved)
    for auto_class in (AutoModel, Sam2UNetForSemanticSegmentation):
        with pytest.raises(OSError, match=r"(?s)holds only what was trained.*sam2.*Pass `encoder_source=`"):
            auto_class.from_pretrained(tmp_path / "small")
        loaded = auto_class.from_pretrained(tmp_path / "small", encoder_source=str(moved))
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again", trainable_only=True)
    assert config_of(tmp_path / "again")["encoder_source"] == str(moved)


def test_another_encoder_is_refused(model, sam2_folder, tmp_path):
    model.save_pretrained(tmp_path / "small", trainable_only=True)
    other = sam2_model("sam2")
    with torch.no_grad():
        other.vision_encoder.backbone.pos_embed += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"was trained on an encoder with SHA-256 .*other has .* Pass `encoder_source="
    ):
        AutoModel.from_pretrained(tmp_path / "small", encoder_source=str(tmp_path / "other"))


def test_a_checkpoint_that_lost_its_encoder_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, trainable_only=True)
    change_config(tmp_path, encoder_sha256=None)
    with pytest.raises(
        ValueError, match=r"lacks \d+ weights of the encoder, such as 'encoder.blocks.0.*encoder_sha256"
    ):
        AutoModel.from_pretrained(tmp_path)
    change_config(tmp_path, encoder_sha256="0" * 64, encoder_source=None)
    with pytest.raises(OSError, match="`encoder_source` is missing in its config"):
        AutoModel.from_pretrained(tmp_path)


def test_a_trainer_saves_resumes_and_ends_without_the_encoder(sam2_folder, tmp_path, caplog):
    model = fine_tuned(sam2_folder)
    pixels = torch.randint(0, 256, (4, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    rows = Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "mask": [Image.fromarray(i % 4) for i in pixels]}
    )
    transform = SegmentationTransform(
        Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 64, "width": 64}), label_mapping=None
    )
    rows = rows.with_transform(transform)

    def trainer(model, epochs):
        args = TrainingArguments(
            tmp_path / "run", use_cpu=True, remove_unused_columns=False, save_strategy="epoch", eval_strategy="epoch",
            num_train_epochs=epochs, load_best_model_at_end=True, report_to="none", disable_tqdm=True,
            learning_rate=1e-3, lr_scheduler_type="constant", hub_token="hf_secret",
        )  # fmt: skip
        return Sam2UNetTrainer(model, args, trainable_only=True, train_dataset=rows, eval_dataset=rows)

    trainer(model, 1).train()
    whole = sum(value.nbytes for value in model.state_dict().values())
    encoder = sum(value.nbytes for name, value in model.encoder.state_dict().items() if ".adapter." not in name)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "model.safetensors").stat().st_size < whole - encoder + 100_000
    assert b"hf_secret" not in (checkpoint / "training_args.bin").read_bytes()
    resumed = fine_tuned(sam2_folder)
    trainer(resumed, 2).train(resume_from_checkpoint=str(checkpoint))
    assert "missing keys" not in caplog.text
    straight = fine_tuned(sam2_folder)
    shutil.rmtree(tmp_path / "run")
    last = trainer(straight, 2)
    last.train()
    torch.testing.assert_close(logits(resumed), logits(straight), atol=1e-4, rtol=1e-4)
    other = fine_tuned(sam2_folder)
    other.config.encoder_source = None
    with torch.no_grad():
        other.encoder.pos_embed += 1
    other.save_pretrained(tmp_path / "other")
    whole = Sam2UNetTrainer(other, last.args, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ValueError, match="was trained on an encoder with SHA-256 .*, the one of this model has None"):
        whole.train(resume_from_checkpoint=last.state.best_model_checkpoint)
    last.save_model()
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "run")), logits(straight))


def test_a_trainer_refuses_small_checkpoints_of_a_trained_encoder_before_it_trains(sam2_folder, tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, remove_unused_columns=False, report_to="none")
    with pytest.raises(ValueError, match="`trainable_only` must be False for a model whose encoder is trained"):
        Sam2UNetTrainer(fine_tuned(sam2_folder, freeze_encoder=False), args, trainable_only=True)
    with pytest.raises(ValueError, match="needs to know where the encoder comes from"):
        Sam2UNetTrainer(small_model(), args, trainable_only=True)


# As any transformers model


@pytest.mark.parametrize("trainable_only", [False, True], ids=["whole", "small"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "auto"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
        {"output_hidden_states": True},
        {"output_loading_info": True},
    ],
    ids=str,
)
def test_loading_options(model, tmp_path, trainable_only, options):
    model.save_pretrained(tmp_path, trainable_only=trainable_only)
    loaded = AutoModel.from_pretrained(tmp_path, **options)
    if "output_loading_info" in options:
        loaded, loading_info = loaded
        assert not loading_info["missing_keys"]
        assert not loading_info["unexpected_keys"]
    if options.get("dtype") == torch.bfloat16:
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(logits(loaded), logits(model.to(torch.bfloat16)))
    elif "attn_implementation" in options:
        assert loaded.encoder.blocks[0].attn.config._attn_implementation == "eager"
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(logits(loaded), logits(model))
    if "output_hidden_states" in options:
        assert loaded(IMAGE).hidden_states is not None
    assert not loaded.encoder.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize("trainable_only", [False, True], ids=["whole", "small"])
def test_shards_subfolders_and_variants(model, tmp_path, trainable_only):
    model.save_pretrained(tmp_path / "in" / "here", max_shard_size="300KB", trainable_only=trainable_only)
    assert len([*(tmp_path / "in" / "here").glob("model-*-of-*.safetensors")]) > 3
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "in", subfolder="here")), logits(model))
    model.save_pretrained(tmp_path / "variant", variant="fp32", trainable_only=trainable_only)
    assert (tmp_path / "variant" / "model.fp32.safetensors").exists()
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "variant", variant="fp32")), logits(model))


def test_a_state_dict_in_memory_loads(model):
    loaded = Sam2UNetForSemanticSegmentation.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(loaded), logits(model))


# Damaged


class Payload:
    """What a pickle can do: it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("layout", ["alone", "indexed", "beside"])
def test_a_pickle_is_never_loaded(tmp_path, layout):
    model = small_model()
    model.save_pretrained(tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    ran = tmp_path / "ran"
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(ran)}))
    if layout == "beside":
        assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "checkpoint")), logits(model))
    else:
        if layout == "indexed":
            index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "pytorch_model.bin")}
            (tmp_path / "checkpoint" / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
        message = "safetensors" if layout == "alone" else r"names pytorch_model.bin, which is no safetensors file"
        for options in ({}, {"use_safetensors": None, "weights_only": False}):
            with pytest.raises((OSError, ValueError), match=message):
                AutoModel.from_pretrained(tmp_path / "checkpoint", **options)
        for file in ("adapter_model.bin", "other.safetensors.index.json"):
            change_config(tmp_path / "checkpoint", transformers_weights=file)
            with pytest.raises(ValueError, match=f"names {file} as `transformers_weights`"):
                AutoModel.from_pretrained(tmp_path / "checkpoint")
    for arguments in (
        {"pretrained_model_name_or_path": tmp_path / "checkpoint", "use_safetensors": False},
        {"pretrained_model_name_or_path": tmp_path / "checkpoint" / "pytorch_model.bin", "config": small_config()},
    ):
        with pytest.raises(ValueError, match=r"from safetensors files only, .*python -m sam2unet_hf.conversion"):
            Sam2UNetForSemanticSegmentation.from_pretrained(**arguments)
    assert not ran.exists()


@pytest.mark.parametrize("trainable_only", [False, True], ids=["whole", "small"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_safetensors_file_is_named(model, tmp_path, trainable_only, damage):
    model.save_pretrained(tmp_path, trainable_only=trainable_only)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>404</html>"}[damage])
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.* is damaged \(.*\)"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regions": [["WT", [1, 2, 0]]]}, r"regions\['WT'\]` must list label ids >= 1 .* got \[1, 2, 0\]"),
        ({"regions": [["WT", [1, 2, -3]]]}, r"must list label ids >= 1 .* got \[1, 2, -3\]"),
        ({"regions": [["WT", [1, "three"]]]}, r"three"),
        ({"regions": [["WT", [7, 9]]]}, r"`id2label` .* does not name the label ids \[7\] that `regions`"),
        ({"regions": [["WT", [1, 2]], ["TC", [2, 3]]]}, "must be nested or disjoint"),
        ({"regions": []}, "must name at least one region"),
        ({"encoder_source": 3}, "encoder_source"),
    ],
)
def test_a_tampered_config_is_refused(model, tmp_path, fields, message):
    model.save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises((StrictDataclassError, ValueError, TypeError), match=message):
        AutoModel.from_pretrained(tmp_path)


# From the Hub

PUSH = """
import sys
from sam2unet_hf import Sam2UNetForSemanticSegmentation

folder, source, repo = sys.argv[1:]
model = Sam2UNetForSemanticSegmentation.from_pretrained(folder)
model.config.encoder_source = source
model.push_to_hub(repo, trainable_only=True)
"""

LOAD = """
import sys

sys.modules["sam2unet_hf"] = None
import torch
from transformers import AutoModel

repo, image, output = sys.argv[1:]
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load(image)).logits, output)
    model.decode_head.classifier.bias += 1
model.push_to_hub(repo, trainable_only=True)
"""

LOAD_FROM = """
import json, sys

sys.modules["sam2unet_hf"] = None
from transformers import AutoModel

repo, *sources = sys.argv[1:]
errors = []
for source in sources:
    try:
        AutoModel.from_pretrained(repo, trust_remote_code=True, encoder_source=source)
    except (OSError, ValueError) as err:
        errors.append(str(err))
print(json.dumps(errors))
"""


def run(hub, tmp_path, code, *arguments, package=False):
    environment = hub.environment(tmp_path / "hf_home", "hf_write")
    if package:
        environment["PYTHONPATH"] = str(ROOT)
    return forks.run(["-c", code, *arguments], cwd=tmp_path, env=environment)


def test_a_small_checkpoint_on_the_hub_fetches_its_encoder_from_the_recorded_commit(model, sam2_folder, tmp_path):
    model.save_pretrained(tmp_path / "model")
    torch.save(IMAGE, tmp_path / "image.pt")
    with LoopbackHub() as hub:
        hub.create("models", "meta/sam2", {path.name: path.read_bytes() for path in sam2_folder.iterdir()})
        commit = hub.commits("models", "meta/sam2")[0].sha
        result = run(hub, tmp_path, PUSH, tmp_path / "model", "meta/sam2", "tester/small", package=True)
        assert result.returncode == 0, result.stderr
        config = json.loads(hub.file("models", "tester/small", "config.json"))
        assert (config["encoder_source"], config["encoder_revision"]) == ("meta/sam2", commit)
        card = hub.file("models", "tester/small", "README.md").decode()
        assert f"The encoder comes from `meta/sam2` at revision `{commit[:12]}`" in card
        assert "base_model: meta/sam2" in card
        assert "It is not in this repository" in card
        # The branch moves on; the recorded commit stays.
        other = sam2_model("sam2")
        randomize(other)
        other.save_pretrained(tmp_path / "newer")
        repo = hub.repos["models", "meta/sam2"]
        weights = hub.store((tmp_path / "newer" / "model.safetensors").read_bytes(), lfs=True)
        repo.objects[weights.key] = weights.size
        repo.commit("main", {**repo.history()[0].files, "model.safetensors": weights}, "Newer")
        for shift in (0, 1):
            result = run(hub, tmp_path, LOAD, "tester/small", "image.pt", "out.pt")
            assert result.returncode == 0, result.stderr
            torch.testing.assert_close(
                torch.load(tmp_path / "out.pt"), logits(model) + shift, atol=1e-6 * shift, rtol=0
            )
        result = run(hub, tmp_path, LOAD_FROM, "tester/small", "meta/sam2", "meta/gone")
        assert result.returncode == 0, result.stderr
        moved, gone = json.loads(result.stdout.splitlines()[-1])
        assert "was trained on an encoder with SHA-256" in moved
        assert re.search(r"its encoder cannot be loaded from meta/gone(?s:.*)Pass `encoder_source=`", gone)
        assert hub.unknown_requests == []
