import copy

import pytest
import torch
import torch.nn.functional as F
from common import BRATS_REGIONS, randomize, small_backbone_config, small_config, small_model
from transformers import AutoModel, AutoModelForSemanticSegmentation, Sam2HieraDetModel

from sam2unet_hf import (
    Sam2UNetConfig,
    Sam2UNetForSemanticSegmentation,
    deep_supervision_loss,
    encoder_sam2unet,
    windows_sam2unet,
)
from sam2unet_hf.configuration_sam2unet import PRESETS, preset_backbone_config
from sam2unet_hf.encoder_sam2unet import interpolate_bicubic
from sam2unet_hf.windows_sam2unet import Sam2UNetWindowLayout


SIZES = [(352, 352), (224, 320), (96, 96), (512, 384)]


def adapters_at_zero(model: Sam2UNetForSemanticSegmentation) -> None:
    with torch.no_grad():
        for block in model.encoder.blocks:
            # GELU(0) is 0, so the adapter adds nothing.
            block.adapter.up_proj.weight.zero_()
            block.adapter.up_proj.bias.zero_()


def assert_encoder_equals_transformers(backbone_config, size, dtype, attn_implementation="sdpa"):
    torch.manual_seed(0)
    original = Sam2HieraDetModel(copy.deepcopy(backbone_config)).eval()
    randomize(original)
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            # Features of the order of 1 and soft attention, as trained encoders have them: float32 rounds more where
            # values are large, the original up to 1.4e-5 over 48 blocks (against float64), this encoder 0.4e-5.
            if any(layer in name for layer in (".projection.", ".proj.", ".proj_out.")):
                parameter *= 0.2
            elif ".qkv." in name:
                parameter *= 0.5
    model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig(backbone_config=backbone_config)).eval()
    adapters_at_zero(model)
    result = model.encoder.load_state_dict(original.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".adapter." in name for name in result.missing_keys)
    model.set_attn_implementation(attn_implementation)
    original, model = original.to(dtype), model.to(dtype)
    pixel_values = torch.randn(1, 3, *size, dtype=dtype)
    with torch.inference_mode():
        expected = original(pixel_values).intermediate_hidden_states
        actual = model.encoder(pixel_values)
    for ours, theirs in zip(actual, expected, strict=True):
        theirs = theirs.permute(0, 3, 1, 2)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encoder_with_adapters_at_zero_equals_transformers(size, dtype, attn_implementation):
    assert_encoder_equals_transformers(small_backbone_config(), size, dtype, attn_implementation)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_encoder_with_adapters_at_zero_equals_transformers(preset, size, dtype):
    assert_encoder_equals_transformers(preset_backbone_config(preset), size, dtype)


@pytest.mark.parametrize("regions", [{"WT": [1, 2, 3]}, BRATS_REGIONS], ids=["one", "three"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (240, 240), (100, 132)], ids=str)
def test_logits_have_input_size(regions, size):
    model = small_model(regions=regions)
    with torch.inference_mode():
        output = model(torch.randn(2, 3, *size))
        asked = model(torch.randn(2, 3, *size), output_auxiliary_logits=True, output_hidden_states=True)
    assert output.logits.shape == (2, len(regions), *size)
    assert output.loss is None
    assert output.auxiliary_logits is None
    assert output.hidden_states is None
    assert [logits.shape for logits in asked.auxiliary_logits] == [output.logits.shape] * 2
    padded = [-(-side // 32) * 32 for side in size]
    assert [tuple(features.shape[2:]) for features in asked.hidden_states] == [
        (padded[0] // stride, padded[1] // stride) for stride in (4, 8, 16, 32)
    ]


@pytest.mark.parametrize(("size", "padded"), [((240, 240), (256, 256)), ((100, 132), (128, 160))], ids=str)
def test_other_sizes_equal_padding_right_and_bottom_and_cropping(size, padded):
    model = small_model()
    image = torch.randn(1, 3, *size)
    canvas = torch.zeros(1, 3, *padded)
    canvas[..., : size[0], : size[1]] = image
    with torch.inference_mode():
        expected = model(canvas).logits[..., : size[0], : size[1]]
        torch.testing.assert_close(model(image).logits, expected, atol=0, rtol=0)


def test_tuple_equals_dict_output():
    model = small_model()
    labels = torch.ones(1, 64, 64, dtype=torch.long)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        output = model(image, labels=labels)
        loss, logits, auxiliary = model(image, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(auxiliary[1], output.auxiliary_logits[1])


def test_batch_of_two_equals_two_batches_of_one():
    model = small_model(regions=BRATS_REGIONS)
    images = torch.randn(2, 3, 352, 352)
    with torch.inference_mode():
        together = model(images).logits
        apart = torch.cat([model(images[:1]).logits, model(images[1:]).logits])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_eval_is_deterministic():
    model = small_model()
    image = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(model(image).logits, model(image).logits)


def test_save_and_load_gives_bit_equal_logits(tmp_path):
    model = small_model(regions=BRATS_REGIONS)
    model.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected = model(image).logits
        for auto_class in (Sam2UNetForSemanticSegmentation, AutoModel, AutoModelForSemanticSegmentation):
            loaded = auto_class.from_pretrained(tmp_path)
            assert isinstance(loaded, Sam2UNetForSemanticSegmentation)
            assert not loaded.training
            assert torch.equal(loaded(image).logits, expected)


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_encoder_is_frozen_but_for_its_adapters(tmp_path):
    model = small_model()
    expected = {name for name, _ in model.named_parameters() if ".adapter." in name or name.startswith("decode_head.")}
    assert trainable_names(model) == expected
    model.save_pretrained(tmp_path)
    assert trainable_names(Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path)) == expected
    unfrozen = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path, freeze_encoder=False)
    assert trainable_names(unfrozen) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_training_step_moves_exactly_the_trainable_weights(freeze_encoder):
    model = small_model(freeze_encoder=freeze_encoder, regions=BRATS_REGIONS).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # Without weight decay, so that a weight moves only because it has a gradient.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    labels = torch.zeros(2, 96, 96, dtype=torch.long)
    labels[:, 20:70, 30:60] = 2
    labels[:, 30:50, 40:55] = 1
    labels[:, 35:45, 45:50] = 3
    model(torch.randn(2, 3, 96, 96), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize(
    ("preset", "total", "trainable"),
    # Design figures of the reference in millions, less the 0.11 M of the block it never calls.
    [("tiny", 29.55 - 0.11, 2.70 - 0.11), ("large", 216.53 - 0.11, 4.38 - 0.11)],
)
def test_parameter_counts_are_those_of_the_reference(preset, total, trainable):
    with torch.device("meta"):
        model = Sam2UNetForSemanticSegmentation(Sam2UNetConfig.from_preset(preset))
    assert model.num_parameters() / 1e6 == pytest.approx(total, abs=0.0101)
    assert model.num_parameters(only_trainable=True) / 1e6 == pytest.approx(trainable, abs=0.0101)


def test_bfloat16_stays_close_to_float32():
    model = small_model()
    images = torch.randn(2, 3, 352, 352)
    with torch.inference_mode():
        expected = model(images).logits
        spread = expected.max() - expected.min()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model(images).logits
        half = model.to(torch.bfloat16)(images).logits
    assert half.dtype == torch.bfloat16
    assert ((autocast.float() - expected).abs().max() / spread).item() < 0.05
    assert ((half.float() - expected).abs().max() / spread).item() < 0.05


def test_gradient_checkpointing_gives_the_same_gradients():
    model = small_model().train()
    image, labels = torch.randn(2, 3, 96, 96), torch.ones(2, 96, 96, dtype=torch.long)
    labels[:, :40] = 0
    twin = copy.deepcopy(model)
    twin.activation_checkpointing_enable()
    model(image, labels=labels).loss.backward()
    twin(image, labels=labels).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_initialisation_is_pytorchs_for_decoder_and_adapters():
    torch.manual_seed(0)
    model = Sam2UNetForSemanticSegmentation(small_config())
    layer = model.decode_head.up_blocks[0].conv1.conv
    bound = layer.weight[0].numel() ** -0.5
    assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    adapter = model.encoder.blocks[0].adapter.down_proj
    assert adapter.weight.abs().max().item() == pytest.approx(adapter.in_features**-0.5, rel=0.05)
    assert adapter.bias.abs().max() > 0
    encoder_layer = model.encoder.blocks[-1].mlp.proj_in
    assert encoder_layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not encoder_layer.bias.any()


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bce": True},
        {"iou_over_batch": True},
        {"auxiliary_loss_weights": [0.5, 0.25]},
    ],
    ids=str,
)
def test_loss_options_of_the_config_are_those_of_the_loss(options):
    image, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    labels[0, 20:50, 10:40] = 1
    with torch.inference_mode():
        output = small_model(**options)(image, labels=labels)
        default = small_model()(image, labels=labels).loss
    weights = options.get("auxiliary_loss_weights", [1.0, 1.0])
    expected = deep_supervision_loss(
        [output.logits, *output.auxiliary_logits],
        (labels == 1).float().unsqueeze(1),
        output_weights=[1.0, *weights],
        **{name: value for name, value in options.items() if name != "auxiliary_loss_weights"},
    )
    torch.testing.assert_close(output.loss, expected)
    assert not torch.allclose(output.loss, default, rtol=1e-3)


@pytest.mark.parametrize(("attn_implementation", "calls_per_block"), [("eager", 1), ("sdpa", 0)])
def test_attention_implementation_is_the_one_that_runs(monkeypatch, attn_implementation, calls_per_block):
    calls = []
    original = encoder_sam2unet.eager_attention
    monkeypatch.setattr(
        encoder_sam2unet, "eager_attention", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    model = Sam2UNetForSemanticSegmentation(small_config(attn_implementation=attn_implementation))
    assert model.config._attn_implementation == attn_implementation
    # 64x64 fills whole windows of 8 and 4; 4x4 and 2x2 maps are one part of a window.
    model(torch.zeros(1, 3, 64, 64))
    assert len(calls) == calls_per_block * len(model.encoder.blocks)


def test_flash_attention_is_refused():
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        small_model().set_attn_implementation("flash_attention_2")


def test_gradient_checkpointing_runs_each_block_twice(monkeypatch):
    model = small_model().train()
    model.activation_checkpointing_enable()
    calls = []
    # A part of every block, since the forward of the block itself is wrapped by transformers.
    original = encoder_sam2unet.Sam2UNetFeedForward.forward
    monkeypatch.setattr(
        encoder_sam2unet.Sam2UNetFeedForward, "forward", lambda self, x: calls.append(1) or original(self, x)
    )
    model(torch.randn(2, 3, 64, 64), labels=torch.ones(2, 64, 64, dtype=torch.long)).loss.backward()
    assert len(calls) == 2 * len(model.encoder.blocks)


def test_from_sam2_takes_no_unknown_arguments():
    with pytest.raises(TypeError, match="got region, which is no field of `Sam2UNetConfig`"):
        Sam2UNetForSemanticSegmentation.from_sam2("sam2.pt", region={"WT": [1]})


def test_label_map_equals_its_region_masks():
    model = small_model(regions=BRATS_REGIONS)
    image = torch.randn(2, 3, 64, 96)
    labels = torch.randint(0, 4, (2, 64, 96))
    masks = torch.stack([labels > 0, (labels == 1) | (labels == 3), labels == 3], dim=1).float()
    with torch.inference_mode():
        from_map, from_masks = model(image, labels=labels).loss, model(image, labels=masks).loss
    torch.testing.assert_close(from_map, from_masks, atol=0, rtol=0)


@pytest.mark.parametrize("size", [(48, 40), (128, 100)], ids=str)
def test_labels_of_any_size_resize_the_logits(size):
    model = small_model()
    image = torch.randn(1, 3, 64, 64)
    labels = torch.zeros(1, *size, dtype=torch.long)
    labels[:, 10:30, 12:33] = 1
    with torch.inference_mode():
        output = model(image, labels=labels)
        outputs = [output.logits, *output.auxiliary_logits]
        resized = [
            torch.nn.functional.interpolate(o, size=size, mode="bilinear", align_corners=False) for o in outputs
        ]
        expected = model.compute_loss(resized, labels)
    assert output.logits.shape[-2:] == (64, 64)
    torch.testing.assert_close(output.loss, expected, atol=0, rtol=0)


def test_list_of_labels_of_different_sizes_is_the_mean_over_images():
    model = small_model()
    images = torch.randn(2, 3, 64, 64)
    labels = [torch.randint(0, 2, (40, 60)), torch.randint(0, 2, (90, 70))]
    with torch.inference_mode():
        together = model(images, labels=labels).loss
        apart = [model(images[i : i + 1], labels=labels[i][None]).loss for i in range(2)]
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_ignored_pixels_change_nothing():
    model = small_model()
    image = torch.randn(1, 3, 64, 64)
    labels = torch.randint(0, 2, (1, 64, 64))
    labels[:, 20:40, 10:50] = model.config.ignore_index
    with torch.inference_mode():
        output = model(image, labels=labels)
        outputs = [logits.clone() for logits in (output.logits, *output.auxiliary_logits)]
        for logits in outputs:
            logits[..., 20:40, 10:50] = 7
        torch.testing.assert_close(model.compute_loss(outputs, labels), output.loss, atol=0, rtol=0)
        labels[:, 20, 10] = 1
        assert not torch.allclose(model.compute_loss(outputs, labels), output.loss, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 1, 64, 64), r"must have shape \(batch_size, 3, height, width\), got \(1, 1, 64, 64\)"),
        ((3, 64, 64), r"got \(3, 64, 64\)"),
        ((1, 3, 63, 128), "at least 64 pixels high and wide, got 63x128"),
    ],
)
def test_wrong_images_raise(shape, match):
    with pytest.raises(ValueError, match=match):
        small_model()(torch.zeros(shape))


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2, 64, 64, dtype=torch.long),
        torch.zeros(1, 1, 64, 64, dtype=torch.long),
        torch.zeros(1, 64, 64),
        torch.zeros(1, 2, 64, 64),
        [torch.zeros(64, 64)],
        [torch.zeros(64, 64, dtype=torch.long)] * 2,
    ],
    ids=["batch", "integer masks", "float map", "regions", "list of float maps", "list too long"],
)
def test_wrong_labels_raise(labels):
    with pytest.raises(ValueError, match="`labels` must be integer label maps of shape"):
        small_model()(torch.zeros(1, 3, 64, 64), labels=labels)


@pytest.mark.parametrize(
    "backend",
    ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))],
)
def test_it_compiles_to_one_graph(backend):
    """With a mask in inference, and without one in training."""
    # 96x64 has windows cut off on the right and at the bottom.
    pixel_values = torch.randn(2, 3, 96, 64)
    labels = (torch.rand(2, 1, 96, 64) > 0.8).float()
    torch.compiler.reset()
    model, compiled_model = small_model(), small_model()
    compiled = torch.compile(compiled_model, fullgraph=True, backend=backend)
    pixel_mask = torch.rand(2, 96, 64) > 0.5
    with torch.no_grad():
        expected = model(pixel_values, pixel_mask=pixel_mask).logits
        torch.testing.assert_close(
            compiled(pixel_values, pixel_mask=pixel_mask).logits, expected, atol=1e-5, rtol=1e-4
        )
    losses = []
    for trained, run in ((model, model), (compiled_model, compiled)):
        trained.train()
        loss = run(pixel_values, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for (name, expected), (_, got) in zip(model.named_parameters(), compiled_model.named_parameters(), strict=True):
        assert (expected.grad is None) == (got.grad is None), name
        if expected.grad is not None:
            # Biases before batch norm have no gradient but rounding.
            scale = max(1e-4, expected.grad.abs().max().item())
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-3 * scale, rtol=1e-2)
    torch.compiler.reset()


@pytest.mark.parametrize(("height", "width"), [(22, 22), (16, 28), (8, 6), (28, 14)])
def test_window_order_is_undone(height, width):
    layout = Sam2UNetWindowLayout(2, height, width, 14)
    maps = torch.arange(2 * height * width * 3).view(2, height, width, 3)
    tokens = layout.pack(maps)
    assert tokens.shape == (2 * height * width, 3)
    assert torch.equal(layout.unpack(tokens), maps)
    assert torch.equal(layout.merge(layout.split(tokens)), tokens)
    assert torch.equal(layout.from_sequences(layout.to_sequences(tokens)), tokens)
    assert torch.equal(layout.to_sequences(tokens).sort(dim=1).values, maps.flatten(1, 2))
    pooled = layout.after_pooling([2, 2]).unpack(layout.pool(tokens.float(), [2, 2]))
    expected = torch.nn.functional.max_pool2d(maps.permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
    assert torch.equal(pooled, expected)


def test_batch_norm_in_training_mode_sees_the_whole_batch_without_gradients_too(monkeypatch):
    monkeypatch.setattr(windows_sam2unet, "MAX_TOKENS", 1)
    model = small_model().train()
    pixel_values = torch.randn(3, 3, 64, 64)
    expected = model(pixel_values).logits
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, expected.detach(), atol=1e-5, rtol=0)


def test_a_batch_in_chunks_gives_what_each_image_gives(monkeypatch):
    model = small_model(regions=BRATS_REGIONS)
    pixel_values = torch.randn(5, 3, 96, 64)
    with torch.no_grad():
        whole = model(pixel_values, output_auxiliary_logits=True, output_hidden_states=True)
        sizes = []
        run_stage = model.encoder.run_stage

        def counted(maps, stage):
            sizes.append((stage, len(maps)))
            return run_stage(maps, stage)

        monkeypatch.setattr(model.encoder, "run_stage", counted)
        # 24 x 16 tokens per image in the first stage, a quarter in the second.
        monkeypatch.setattr(windows_sam2unet, "MAX_TOKENS", 2 * 24 * 16)
        chunked = model(pixel_values, output_auxiliary_logits=True, output_hidden_states=True)
    assert sizes == [(0, 2), (0, 2), (0, 1), (1, 5), (2, 5), (3, 5)]
    tensors = zip(
        (whole.logits, *whole.auxiliary_logits, *whole.hidden_states),
        (chunked.logits, *chunked.auxiliary_logits, *chunked.hidden_states),
        strict=True,
    )
    for expected, got in tensors:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    sizes.clear()
    model(pixel_values)
    # Gradients are wanted, so nothing is gained.
    assert sizes == [(stage, 5) for stage in range(4)]


def trained_statistics(model):
    """Let batch norm see images and weights unlike its initial ones."""
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    return model.eval()


def test_fused_for_inference_gives_the_same_logits_and_is_undone():
    model = trained_statistics(small_model(regions=BRATS_REGIONS))
    pixel_values = torch.randn(2, 3, 96, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(pixel_values).logits
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    calls = []
    handles = [norm.register_forward_hook(lambda *_: calls.append(1)) for norm in norms]
    model.fuse_for_inference()
    with torch.inference_mode():
        fused = model(pixel_values).logits
        torch.testing.assert_close(fused, expected, atol=1e-4, rtol=0)
        assert not calls
        assert not torch.equal(fused, expected)
        assert model.state_dict().keys() == before.keys()
        model.fuse_for_inference(False)
        assert torch.equal(model(pixel_values).logits, expected)
    assert len(calls) == len(norms)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_and_loading_undo_the_fusion(tmp_path):
    model = trained_statistics(small_model())
    other = trained_statistics(small_model())
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = other(pixel_values).logits
    model.fuse_for_inference()
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(pixel_values).logits, expected)
    model.fuse_for_inference()
    model.train().eval()
    with torch.inference_mode():
        assert torch.equal(model(pixel_values).logits, expected)
    model.fuse_for_inference()
    model.save_pretrained(tmp_path)
    loaded = Sam2UNetForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(pixel_values).logits, expected)


def test_fusion_in_training_mode_raises():
    with pytest.raises(ValueError, match="needs a model in eval mode. Call `model.eval"):
        small_model().train().fuse_for_inference()


@pytest.mark.parametrize(
    ("capabilities", "max_keys", "is_eager"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, 21, True),
        ({"avx512_bf16": True, "amx_bf16": False}, 20, False),  # long sequences would take much memory
        ({"avx512_bf16": True, "amx_bf16": True}, 21, False),
        ({}, 21, False),
    ],
)
def test_bfloat16_attention_of_any_processor_infers_as_in_float32(monkeypatch, capabilities, max_keys, is_eager):
    has_it = encoder_sam2unet.has_avx512_bfloat16_alone(capabilities)
    monkeypatch.setattr(encoder_sam2unet, "HAS_AVX512_BFLOAT16_ALONE", has_it)
    monkeypatch.setattr(encoder_sam2unet, "MAX_EAGER_KEYS", max_keys)
    calls = []
    eager = encoder_sam2unet.eager_attention
    monkeypatch.setattr(encoder_sam2unet, "eager_attention", lambda *args, **kw: calls.append(1) or eager(*args, **kw))
    torch.manual_seed(0)
    attention = small_model().encoder.blocks[4].attn
    qkv = [torch.randn(3, 20, attention.proj.in_features) for _ in range(3)]
    padded = torch.randn(3 * attention.proj.in_features)
    with torch.inference_mode():
        expected = attention.attend(*qkv, num_padded=5, padded_token=padded)
        assert not calls
        got = attention.attend(*(part.bfloat16() for part in qkv), num_padded=5, padded_token=padded)
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert bool(calls) is is_eager


@pytest.mark.parametrize("size", [(88, 88), (7, 7), (12, 9), (5, 40)], ids=str)
def test_interpolation_by_matrix_products_is_that_of_pytorch(size):
    torch.manual_seed(0)
    maps = torch.randn(1, 8, 7, 7)
    expected = F.interpolate(maps.double(), size=size, mode="bicubic")
    assert (interpolate_bicubic(maps.double(), *size) - expected).abs().max() < 2e-5  # coordinates are in float32
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2**-8 * float(expected.abs().max()))):
        rounded = maps.to(dtype)
        expected = F.interpolate(rounded.double(), size=size, mode="bicubic")
        with torch.autocast("cpu", torch.bfloat16):
            got = interpolate_bicubic(rounded, *size)
        assert got.dtype == dtype
        assert (got - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_attention_trains_on_the_cpu_as_in_float32(dtype):
    torch.manual_seed(0)
    attention = small_model().encoder.blocks[4].attn
    qkv = [torch.randn(3, 20, attention.proj.in_features) for _ in range(3)]
    gradients = []
    for kind in (torch.float32, dtype):
        leaves = [tensor.to(kind, copy=True).requires_grad_() for tensor in qkv]
        output = attention.attend(*leaves, num_padded=5)
        assert output.dtype == kind
        output.float().square().sum().backward()
        gradients.append([leaf.grad.float() for leaf in leaves])
    for expected, got in zip(*gradients, strict=True):
        assert (got - expected).norm() < 0.03 * expected.norm()
