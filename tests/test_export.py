"""`torch.export` on the model, and ONNX files against PyTorch."""

import copy
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_backbone_config, small_model
from safetensors.torch import load_file, save_file

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.export import OnnxExportError, __main__, check_onnx, export_onnx, graph, onnx


PROCESSOR = {"size": {"height": 70, "width": 90}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def exported_model(num_channels=3, **kwargs):
    return small_model(backbone_config=small_backbone_config(num_channels=num_channels), **kwargs)


def test_exported_program_gives_equal_logits_at_other_batch_sizes():
    model = exported_model(regions=BRATS_REGIONS)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (torch.zeros(2, 3, 70, 90),), dynamic_shapes=(batch,), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, 70, 90)
        with torch.inference_mode():
            assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.fixture(scope="module")
def onnxruntime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def models():
    """What the files compute: the one for images of every size takes six channels."""
    return {
        "fixed": exported_model(regions=BRATS_REGIONS),
        "dynamic": exported_model(num_channels=6, regions=BRATS_REGIONS),
    }


@pytest.fixture(scope="module")
def model(models):
    return models["fixed"]


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        options = {"num_channels": 6, "image_mean": 6 * [0.1], "image_std": 6 * [0.4]} if name == "dynamic" else {}
        processor = Sam2UNetImageProcessor(regions=BRATS_REGIONS, **{**PROCESSOR, **options})
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return checkpoints / "fixed"


@pytest.fixture(scope="module")
def programs():
    """What `convert` returned, by `dynamic_size`."""
    return {}


@pytest.fixture(scope="module")
def files(onnxruntime, checkpoints, programs, tmp_path_factory):
    """A file for images of 70x90 and one for images of every size."""
    convert = onnx.convert

    def keep_program(*args):
        programs[args[2]] = convert(*args)
        return programs[args[2]]

    folder = tmp_path_factory.mktemp("onnx") / "new"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(onnx, "convert", keep_program)
        __main__.main([str(checkpoints / "fixed"), str(folder / "fixed.onnx")])
        arguments = [str(checkpoints / "dynamic"), str(folder / "dynamic.onnx")]
        __main__.main([*arguments, "--dynamic_size", "--image_size", "96"])
    assert sorted(path.name for path in folder.iterdir()) == ["dynamic.onnx", "fixed.onnx"]
    return {"fixed": folder / "fixed.onnx", "dynamic": folder / "dynamic.onnx"}


def assert_file_gives_the_models_logits(session, model, shape):
    pixel_values = torch.randn(shape)
    (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(pixel_values).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_file_for_one_size_gives_the_models_logits(onnxruntime, files, model, batch_size):
    session = onnxruntime.InferenceSession(files["fixed"])
    assert session.get_inputs()[0].shape == ["batch", 3, 70, 90]
    assert session.get_outputs()[0].shape == ["batch", 3, 70, 90]
    assert_file_gives_the_models_logits(session, model, (batch_size, 3, 70, 90))


# One window or several, with none, some or all of them padded, in the stages; sizes with and without padding.
@pytest.mark.parametrize("size", [(64, 64), (70, 90), (96, 224), (225, 64), (448, 256), (289, 352)], ids=str)
def test_file_for_every_size_gives_the_models_logits(onnxruntime, files, models, size):
    session = onnxruntime.InferenceSession(files["dynamic"])
    assert session.get_inputs()[0].shape == ["batch", 6, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 3, "height", "width"]
    for batch_size in (1, 2):
        assert_file_gives_the_models_logits(session, models["dynamic"], (batch_size, 6, *size))


def test_padded_attention_equals_the_models():
    model = exported_model()
    padded = graph.AnySizeLogits(onnx.copy_on_cpu(model))
    for size in [(70, 90), (352, 352)]:
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(padded(images), model(images).logits, atol=1e-5, rtol=0)
    assert not any(isinstance(module, graph.PaddedWindowAttention) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed", "dynamic"])
def test_file_in_float16_is_half_the_size_and_gives_the_models_logits(
    onnxruntime, checkpoints, files, models, tmp_path, name
):
    file = tmp_path / "half.onnx"
    option = ["--dynamic_size"] if name == "dynamic" else []
    __main__.main([str(checkpoints / name), str(file), "--dtype", "float16", *option])
    session = onnxruntime.InferenceSession(file)
    assert [value.type for value in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2
    pixel_values = torch.randn(2, 6 if name == "dynamic" else 3, 70, 90)
    (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
    with torch.inference_mode():
        expected = models[name](pixel_values).logits
    assert 0 < np.abs(logits - expected.numpy()).max() < 0.01 * expected.abs().max()
    assert file.stat().st_size < 0.7 * files[name].stat().st_size


def test_file_in_bfloat16_is_refused(onnxruntime, model, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be torch.float32 or torch.float16, got torch.bfloat16. onnxru"):
        export_onnx(model, tmp_path / "model.onnx", dtype=torch.bfloat16)
    assert not any(tmp_path.iterdir())


def test_file_for_one_size_names_no_float_type(onnxruntime, files):
    """Converters to float16 change weights and inputs, not the types that nodes name."""
    graph = pytest.importorskip("onnx").load(files["fixed"]).graph
    assert len(graph.node) > 100
    assert not [node.name for node in graph.node if node.op_type in ("Cast", "ConstantOfShape", "RandomNormal")]


@pytest.mark.parametrize("converter", ["onnxruntime.transformers.float16", "onnxconverter_common.float16"])
def test_file_for_one_size_is_converted_to_float16_by_the_usual_tools(onnxruntime, files, model, tmp_path, converter):
    convert = pytest.importorskip(converter).convert_float_to_float16
    half = convert(pytest.importorskip("onnx").load(files["fixed"]))
    (tmp_path / "half.onnx").write_bytes(half.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx")
    pixel_values = torch.randn(2, 3, 70, 90)
    (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy().astype(np.float16)})
    with torch.inference_mode():
        expected = model(pixel_values).logits
    assert np.abs(logits - expected.numpy()).max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "size", "image_mean", "image_std"),
    [("fixed", (70, 90), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), ("dynamic", (96, 96), 6 * [0.1], 6 * [0.4])],
)
def test_metadata_say_how_to_use_the_file(onnxruntime, files, name, size, image_mean, image_std):
    metadata = onnxruntime.InferenceSession(files[name]).get_modelmeta().custom_metadata_map
    values = {key: json.loads(value) for key, value in metadata.items()}
    assert values["regions"] == [["WT", [1, 2, 3]], ["TC", [1, 3]], ["ET", [3]]]
    assert values["region_levels"] == [{"WT": 2}, {"TC": 1}, {"ET": 3}]
    assert values["id2label"] == {"0": "background", "1": "TC without ET", "2": "WT without TC", "3": "ET"}
    assert values["image_processor"] == {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": "bilinear",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image_mean,
        "image_std": image_std,
    }


def test_metadata_of_a_cropping_processor_say_how_slices_are_cut():
    model = exported_model(num_channels=6)
    window = {"height": 96, "width": 64}
    options = {"num_channels": 6, "neighbours": 1, "head_crop_size": window, "plane": "axial"}
    processor = Sam2UNetImageProcessor(modalities=["flair", "t1ce"], **options)
    values = json.loads(onnx.onnx_metadata(model, processor, (96, 64))["image_processor"])
    assert values["head_crop_size"] == window
    assert not values["do_resize"]
    assert "size" not in values
    assert (values["modalities"], values["neighbours"], values["plane"]) == (["flair", "t1ce"], 1, "axial")
    assert values["image_mean"] == pytest.approx([0.449] * 6)
    # An enlarged window.
    processor.head_crop_scale = 2
    values = json.loads(onnx.onnx_metadata(model, processor, (192, 128))["image_processor"])
    assert values["head_crop_size"] == window
    assert values["do_resize"]
    assert values["size"] == {"height": 192, "width": 128}


def test_window_of_the_processor_is_the_size_of_the_images(onnxruntime, monkeypatch, tmp_path):
    model = exported_model(num_channels=6)
    processor = Sam2UNetImageProcessor(num_channels=6, head_crop_size={"height": 96, "width": 64})
    sizes = []

    def convert(model, image_size, dynamic_size, dtype):
        sizes.append(image_size)
        raise OnnxExportError("not here")

    monkeypatch.setattr(onnx, "convert", convert)
    with pytest.raises(OnnxExportError, match="not here"):
        export_onnx(model, tmp_path / "model.onnx", processor=processor)
    assert sizes == [(96, 64)]
    # Without a processor the default one for as many channels.
    model.save_pretrained(tmp_path / "checkpoint")
    assert __main__.load_checkpoint(str(tmp_path / "checkpoint"))[1].num_channels == 6


@pytest.mark.slow
def test_model_of_many_channels_and_a_window_is_exported(onnxruntime, tmp_path):
    model = exported_model(num_channels=6)
    processor = Sam2UNetImageProcessor(num_channels=6, head_crop_size={"height": 96, "width": 64})
    assert export_onnx(model, tmp_path / "model.onnx", processor=processor) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 6, 96, 64]


def test_file_alone_is_enough_to_segment_an_image(onnxruntime, files, checkpoint, model):
    session = onnxruntime.InferenceSession(files["fixed"])
    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    preparation = metadata["image_processor"]
    torch.manual_seed(0)
    image = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8).numpy()
    values = (image * preparation["rescale_factor"] - preparation["image_mean"]) / preparation["image_std"]
    pixel_values = values.transpose(2, 0, 1)[None].astype(np.float32)
    (logits,) = session.run(["logits"], {"pixel_values": pixel_values})
    label_map = np.zeros((70, 90), dtype=np.int64)
    for level in metadata["region_levels"]:
        ((name, label_id),) = level.items()
        channel = [region for region, _ in metadata["regions"]].index(name)
        label_map[logits[0, channel] > 0] = label_id

    processor = Sam2UNetImageProcessor.from_pretrained(checkpoint)
    with torch.inference_mode():
        outputs = model(**processor(image, return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs)[0].numpy()
    assert len(np.unique(expected)) > 2
    # A score within rounding of 0 may fall on either side.
    assert (label_map != expected).mean() < 1e-3


def test_file_holds_no_path_of_this_machine(files):
    for file in files.values():
        assert b"modeling_sam2unet.py" not in file.read_bytes()


@pytest.fixture
def converted(monkeypatch, files, programs):
    """Have `export_onnx` take what was converted for `files`, and save the time."""
    monkeypatch.setattr(onnx, "convert", lambda model, image_size, dynamic_size, dtype: programs[dynamic_size])


def test_file_that_fails_the_check_is_not_kept(converted, tmp_path):
    output = tmp_path / "model.onnx"
    output.write_bytes(b"before")
    with pytest.raises(OnnxExportError, match=r"logits of model.onnx for 1 images of 70x90.* differ .* by up to"):
        export_onnx(exported_model(seed=1, regions=BRATS_REGIONS), output, image_size=(70, 90))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert output.read_bytes() == b"before"


def test_new_file_replaces_an_older_one(converted, model, tmp_path):
    output = tmp_path / "model.onnx"
    output.write_bytes(b"before")
    assert 0 < export_onnx(model, output, image_size=(70, 90)) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert check_onnx(output, model, [(2, 70, 90)]) < 1e-4


def test_weights_in_a_second_file_are_found(converted, model, monkeypatch, programs, tmp_path):
    # As `save` does by itself from 1.5 GB on.
    program = programs[False]
    monkeypatch.setattr(program, "save", lambda path: type(program).save(program, path, external_data=True))
    output = tmp_path / "model.onnx"
    export_onnx(model, output, image_size=(70, 90))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert check_onnx(output, model, [(2, 70, 90)]) < 1e-4


def test_check_finds_one_changed_weight(files, models):
    for name, file in files.items():
        changed = onnx.copy_on_cpu(models[name])
        with torch.no_grad():
            changed.encoder.blocks[5].mlp.proj_out.bias[0] += 0.3
        with pytest.raises(OnnxExportError, match=r"differ from the model's by up to 0\.0"):
            check_onnx(file, changed, [(1, 70, 90)])


def test_check_finds_nan(files, model):
    broken = onnx.copy_on_cpu(model)
    with torch.no_grad():
        broken.decode_head.classifier.bias.fill_(float("nan"))
    with pytest.raises(OnnxExportError, match="differ from the model's by up to nan"):
        check_onnx(files["fixed"], broken, [(1, 70, 90)])


def test_check_finds_another_number_of_regions(files):
    with pytest.raises(OnnxExportError, match=r"of shape \(1, 3, 70, 90\), differ .* by up to inf"):
        check_onnx(files["fixed"], exported_model(), [(1, 70, 90)])


def test_check_finds_a_size_that_the_file_does_not_take(files, model):
    with pytest.raises(OnnxExportError, match=r"cannot compute fixed.onnx for 1 images of 96x64: .*dimensions"):
        check_onnx(files["fixed"], model, [(1, 70, 90), (1, 96, 64)])


def test_model_of_any_type_and_mode_is_compared_in_float32(files, model, tmp_path):
    rounded = copy.deepcopy(model).half().train()
    with pytest.raises(OnnxExportError, match="differ from the model's by up to 0.00"):
        check_onnx(files["fixed"], rounded, [(1, 70, 90)])
    assert rounded.training
    assert rounded.dtype == torch.float16


def test_model_that_torch_cannot_export_raises(onnxruntime, model, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise torch.onnx.OnnxExporterError("guards")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(OnnxExportError, match=r"torch \S+ cannot export the model: guards Leave `dynamic_size` out"):
        export_onnx(model, tmp_path / "model.onnx", dynamic_size=True)
    with pytest.raises(OnnxExportError, match=r"torch \S+ cannot export the model: guards Install another torch."):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_arguments_raise(onnxruntime, model, tmp_path):
    with pytest.raises(ValueError, match="`image_size` must be at least 64 pixels high and wide, got 352x32"):
        export_onnx(model, tmp_path / "model.onnx", image_size=(352, 32))
    with pytest.raises(IsADirectoryError, match=r"`output` must be a file, got the folder .*Pass .*model\.onnx"):
        export_onnx(model, tmp_path)
    processor = Sam2UNetImageProcessor(size={"shortest_edge": 96})
    with pytest.raises(ValueError, match=r"`size` must have a height and a width, got \{'shortest_edge': 96\}"):
        export_onnx(model, tmp_path / "model.onnx", processor=processor)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch, model, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(ImportError, match=r"needs .*onnxscript.* Run: pip install onnxscript$"):
        export_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(SystemExit, match="error: ONNX export needs"):
        __main__.main(["absent", str(tmp_path / "model.onnx")])


def test_checkpoint_is_loaded_in_float32_with_its_processor(model, checkpoint, tmp_path):
    copy.deepcopy(model).half().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((checkpoint / "preprocessor_config.json").read_text())
    loaded, processor = __main__.load_checkpoint(str(tmp_path))
    assert loaded.dtype == torch.float32
    assert dict(processor.size) == PROCESSOR["size"]


def test_checkpoint_without_processor_gets_the_default_one(model, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger=__main__.__name__):
        _, processor = __main__.load_checkpoint(str(tmp_path))
    assert "has no image processor, taking the default one." in caplog.text
    assert dict(processor.size) == {"height": 352, "width": 352}
    assert processor.regions == BRATS_REGIONS
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        __main__.load_checkpoint(str(tmp_path))


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    with pytest.raises(ValueError, match="holds a model of type 'segformer', not a SAM2-UNet"):
        __main__.load_checkpoint(str(tmp_path))


def test_checkpoint_that_lacks_a_weight_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    del state_dict["decode_head.classifier.bias"]
    save_file(state_dict, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, such as decode_head.classifier.bias"):
        __main__.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("numbers", "image_size"), [([], None), (["96"], (96, 96)), (["96", "64"], (96, 64))], ids=["none", "one", "two"]
)
def test_image_size_of_the_command_line(numbers, image_size):
    options = ["--image_size", *numbers] if numbers else []
    assert __main__.parse_args(["model", "model.onnx", *options]).image_size == image_size


def test_bad_command_lines_end_with_a_message(onnxruntime, tmp_path, capsys):
    with pytest.raises(SystemExit):
        __main__.main(["model", "model.onnx", "--image_size", "1", "2", "3"])
    assert "--image_size: expected one or two numbers, got 3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: .*absent"):
        __main__.main([str(tmp_path / "absent"), str(tmp_path / "model.onnx")])
