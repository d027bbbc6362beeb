"""Published judges from tiny random models in their real formats: loaders, post-processing, the converter, GenEval."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_judges import clip, dinov2, mask2former

from fluidscale.evaluate.golden import fixed_pictures
from fluidscale.evaluate.judges import convert
from fluidscale.evaluate.judges.clip import ColorClassifier, clip_scores, cut_out, load_clip
from fluidscale.evaluate.judges.dinov2 import load_dinov2
from fluidscale.evaluate.judges.mask2former import instances, load_mask2former, prepared
from fluidscale.evaluate.judges.pretrained import pixels_of
from fluidscale.evaluate.protocol import Detection
from fluidscale.objects import CLASSES, COLORS
from fluidscale.spec import InvalidInput


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    mask2former().save_pretrained(root / "mask2former")
    return {"mask2former": root / "mask2former", "clip": clip(root / "clip"), "dinov2": dinov2(root / "dinov2"),
            "gelu": clip(root / "gelu", "gelu")}  # fmt: skip


# --- Mask2Former ---------------------------------------------------------------------------------------------------


def test_instances_by_hand():
    """Two queries, masks at the image's size: scores, boxes and order as mmdet's, worked out by hand."""
    classes = torch.full((2, 81), -20.0)
    classes[0, 2], classes[0, 80] = 3.0, 1.0  # a car, perhaps nothing
    classes[1, 15] = 5.0  # a cat for sure
    masks = torch.full((2, 8, 10), -4.0)
    masks[0, 2:5, 3:7] = 2.0
    masks[1, :2, :2] = 1.0
    masks[1, 1, 1] = 0.0  # not above 0: outside
    car, cat = instances(classes, masks)[:2]
    assert (cat.cls, cat.box) == ("cat", (0.0, 0.0, 2.0, 2.0)) and (car.cls, car.box) == ("car", (3.0, 2.0, 7.0, 5.0))
    share = math.exp(3) / (math.exp(3) + math.exp(1))
    assert car.score == pytest.approx(share / (1 + math.exp(-2)), rel=1e-4)
    assert cat.score == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-4)
    assert car.mask is not None and cat.mask is not None
    assert car.mask.sum() == 12 and cat.mask.sum() == 3 and car.mask.dtype == bool
    # 100 best pairs at most, the void class among none of them, and nothing of a query without a pixel.
    many = instances(torch.zeros(30, 81), torch.ones(30, 4, 4))
    assert len(many) == 100 and all(one.score == pytest.approx(1 / 81 / (1 + math.exp(-1)), rel=1e-4) for one in many)
    assert instances(classes, torch.full((2, 8, 10), -1.0)) == []


def test_pictures_are_prepared_as_for_mmdet():
    image = np.random.default_rng(0).integers(0, 256, (100, 300, 3), dtype=np.uint8)
    pixels, inner = prepared(image)
    # 1333 / 300 is less than 800 / 100; both sides are padded to whole 32s with grey before normalising.
    assert inner == (444, 1333) and pixels.shape == (1, 3, 448, 1344)
    grey = (128 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(pixels[0, :, -1, -1].numpy(), grey, rtol=1e-5)
    square, inner = prepared(np.full((256, 256, 3), 100, np.uint8))
    assert square.shape == (1, 3, 800, 800) and inner == (800, 800)
    np.testing.assert_allclose(square[0, :, 400, 400].numpy(), (grey * [58.395, 57.12, 57.375] - 28) /
                               [58.395, 57.12, 57.375], rtol=1e-4)  # fmt: skip


def test_the_detector_is_the_model_and_the_post_processing(folders):
    detector = load_mask2former(folders["mask2former"])
    image = fixed_pictures()[0][:96, :128]
    (found,) = detector.detect(image[None])
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True) and len(found) > 10
    assert len(detector.sha256) == 64 and detector.classes == CLASSES
    pixels, inner = prepared(image)
    with torch.no_grad():
        output = mask2former()(pixel_values=pixels)
    masks = F.interpolate(output.masks_queries_logits, pixels.shape[-2:], mode="bilinear", align_corners=False)
    masks = F.interpolate(masks[:, :, : inner[0], : inner[1]], (96, 128), mode="bilinear", align_corners=False)[0]
    classes = output.class_queries_logits[0].softmax(-1)[:, :80]
    query, label = divmod(int(classes.flatten().argmax()), 80)
    mask = masks[query] > 0
    expected = float(classes[query, label]) * float((masks[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
    same = [one for one in found if one.cls == CLASSES[label] and one.score == pytest.approx(expected, rel=1e-4)]
    ys, xs = mask.nonzero(as_tuple=True)
    assert same and same[0].box == (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)


# --- the converter -------------------------------------------------------------------------------------------------


NORMS = {"weight": "weight", "bias": "bias"}
SWIN, PIXEL, INNER = (
    "model.pixel_level_module.encoder",
    "model.pixel_level_module.decoder",
    "model.transformer_module",
)


def pair(source: str, target: str, kinds: dict[str, str] = NORMS) -> dict[str, str]:
    return {f"{source}.{a}": f"{target}.{b}" for a, b in kinds.items()}


def mmdet_names(depths, layers: int, decoders: int, modern: bool) -> dict[str, str]:
    """mmdet's names, by hand, -> where transformers' hub format has that tensor (q, k, v as one, marked by *)."""
    return swin_names(depths) | head_names(layers, decoders, modern)


def swin_names(depths) -> dict[str, str]:
    names: dict[str, str] = {}
    names |= pair("backbone.patch_embed.projection", f"{SWIN}.embeddings.patch_embeddings.projection")
    names |= pair("backbone.patch_embed.norm", f"{SWIN}.embeddings.norm")
    for i, depth in enumerate(depths):
        for j in range(depth):
            a, b = f"backbone.stages.{i}.blocks.{j}", f"{SWIN}.encoder.layers.{i}.blocks.{j}"
            names |= pair(f"{a}.norm1", f"{b}.layernorm_before")
            names |= pair(f"{a}.attn.w_msa.qkv", f"{b}.attention.self.*")
            names |= pair(f"{a}.attn.w_msa.proj", f"{b}.attention.output.dense")
            names[f"{a}.attn.w_msa.relative_position_bias_table"] = f"{b}.attention.self.relative_position_bias_table"
            names |= pair(f"{a}.norm2", f"{b}.layernorm_after")
            names |= pair(f"{a}.ffn.layers.0.0", f"{b}.intermediate.dense")
            names |= pair(f"{a}.ffn.layers.1", f"{b}.output.dense")
        if i < 3:
            names |= pair(f"backbone.stages.{i}.downsample.norm", f"{SWIN}.encoder.layers.{i}.downsample.norm")
            place = f"{SWIN}.encoder.layers.{i}.downsample.reduction.weight"
            names[f"backbone.stages.{i}.downsample.reduction.weight"] = place
        names |= pair(f"backbone.norm{i}", f"{SWIN}.hidden_states_norms.stage{i + 1}")
    return names


def head_names(layers: int, decoders: int, modern: bool) -> dict[str, str]:
    names: dict[str, str] = {}
    head = "panoptic_head"
    for i in range(3):
        names |= pair(f"{head}.pixel_decoder.input_convs.{i}.conv", f"{PIXEL}.input_projections.{i}.0")
        names |= pair(f"{head}.pixel_decoder.input_convs.{i}.gn", f"{PIXEL}.input_projections.{i}.1")
    ffn = "ffn" if modern else "ffns.0"
    for i in range(layers):
        a, b = f"{head}.pixel_decoder.encoder.layers.{i}", f"{PIXEL}.encoder.layers.{i}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            names |= pair(f"{a}.{'self_attn' if modern else 'attentions.0'}.{part}", f"{b}.self_attn.{part}")
        names |= pair(f"{a}.{ffn}.layers.0.0", f"{b}.fc1")
        names |= pair(f"{a}.{ffn}.layers.1", f"{b}.fc2")
        names |= pair(f"{a}.norms.0", f"{b}.self_attn_layer_norm")
        names |= pair(f"{a}.norms.1", f"{b}.final_layer_norm")
    names[f"{head}.pixel_decoder.level_encoding.weight"] = f"{PIXEL}.level_embed"
    for a, b in (("lateral_convs", "adapter_1"), ("output_convs", "layer_1")):
        names |= pair(f"{head}.pixel_decoder.{a}.0.conv", f"{PIXEL}.{b}.0", {"weight": "weight"})
        names |= pair(f"{head}.pixel_decoder.{a}.0.gn", f"{PIXEL}.{b}.1")
    names |= pair(f"{head}.pixel_decoder.mask_feature", f"{PIXEL}.mask_projection")
    for i in range(decoders):
        a, b = f"{head}.transformer_decoder.layers.{i}", f"{INNER}.decoder.layers.{i}"
        cross, own = ("cross_attn", "self_attn") if modern else ("attentions.0", "attentions.1")
        names |= pair(f"{a}.{cross}.attn", f"{b}.cross_attn", {f"in_proj_{k}": f"in_proj_{k}" for k in NORMS})
        names |= pair(f"{a}.{cross}.attn.out_proj", f"{b}.cross_attn.out_proj")
        names |= pair(f"{a}.{own}.attn", f"{b}.self_attn.*_proj", {f"in_proj_{k}": k for k in NORMS})
        names |= pair(f"{a}.{own}.attn.out_proj", f"{b}.self_attn.out_proj")
        for k, part in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
            names |= pair(f"{a}.norms.{k}", f"{b}.{part}")
        names |= pair(f"{a}.{ffn}.layers.0.0", f"{b}.fc1")
        names |= pair(f"{a}.{ffn}.layers.1", f"{b}.fc2")
    names |= pair(f"{head}.transformer_decoder.post_norm", f"{INNER}.decoder.layernorm")
    for a, b in (("query_embed", "queries_embedder"), ("query_feat", "queries_features")):
        names[f"{head}.{a}.weight"] = f"{INNER}.{b}.weight"
    names[f"{head}.level_embed.weight"] = f"{INNER}.level_embed.weight"
    names |= pair(f"{head}.cls_embed", "class_predictor")
    for a, b in ((0, 0), (2, 1), (4, 2)):
        names |= pair(f"{head}.mask_embed.{a}", f"{INNER}.decoder.mask_predictor.mask_embedder.{b}.0")
    return names


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def as_mmdet(weights: dict[str, torch.Tensor], depths, layers: int, decoders: int, modern: bool):
    """A checkpoint as mmdet would have written it, from transformers' weights: the way back, by other code."""
    source: dict[str, torch.Tensor] = {}
    for name, target in mmdet_names(depths, layers, decoders, modern).items():
        if "*" in target:
            parts = ("query", "key", "value") if "encoder" in target else ("q", "k", "v")
            source[name] = torch.cat([weights[target.replace("*", part)] for part in parts])
        elif ".downsample." in name:
            # (column, row, channel) -> (channel, row, column), one index at a time.
            value, channels = weights[target], weights[target].shape[-1] // 4
            order = [(col * 2 + row) * channels + c for c in range(channels) for row in range(2) for col in range(2)]
            source[name] = value[..., order]
        else:
            source[name] = weights[target]
    source["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(49, 49)
    source["panoptic_head.loss_cls.class_weight"] = torch.ones(81)
    return source


@pytest.mark.parametrize("modern", [False, True], ids=["mmdet 2", "mmdet 3"])
def test_a_converted_checkpoint_is_the_same_detector(folders, tmp_path, modern):
    weights = on_disk(folders["mask2former"])
    source = as_mmdet(weights, (1, 1, 2, 1), 1, 2, modern)
    torch.save({"state_dict": source, "meta": {"epoch": 50}}, tmp_path / "mmdet.pth")
    assert convert.main([str(tmp_path / "mmdet.pth"), str(tmp_path / "out")]) == 0
    detector = load_mask2former(tmp_path / "out")
    image = fixed_pictures()[:1, :64, :64]
    (there,), (here,) = load_mask2former(folders["mask2former"]).detect(image), detector.detect(image)
    assert [(d.cls, d.box) for d in there] == [(d.cls, d.box) for d in here]
    np.testing.assert_allclose([d.score for d in here], [d.score for d in there], rtol=1e-5)


def test_every_tensor_of_the_real_checkpoint_has_exactly_one_place():
    """Swin-S with 9 decoder layers, as mmdet names it, onto transformers' model of that shape: a bijection."""
    from transformers import Mask2FormerForUniversalSegmentation

    depths = (2, 2, 18, 2)
    names = mmdet_names(depths, 6, 9, modern=False)
    wanted: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        shapes = _swin_s_shapes()
    source = {name: torch.empty(shapes(target), device="meta") for name, target in names.items()}
    target = convert.converted(source)
    config = convert.configuration(target)
    assert (config.backbone_config.depths, config.backbone_config.num_heads) == ([2, 2, 18, 2], [3, 6, 12, 24])
    assert (config.num_queries, config.decoder_layers, config.encoder_layers) == (100, 10, 6)
    assert (config.num_attention_heads, config.dim_feedforward, config.encoder_feedforward_dim) == (8, 2048, 1024)
    assert config.backbone_config.window_size == 7 and config.num_labels == 80
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # transformers renames parts when it loads; counted by shape there is still one tensor for each place.
    found = Counter(tuple(tensor.shape) for tensor in target.values())
    there = Counter(shape for name, shape in wanted.items() if "swin.layernorm" not in name and "criterion" not in name)
    assert found == there and len(set(target)) == len(target)


def _swin_s_shapes():
    """Where transformers keeps a tensor -> its shape in mmdet's Swin-S checkpoint."""
    widths, heads = (96, 192, 384, 768), (3, 6, 12, 24)

    def shape(target: str) -> tuple[int, ...]:
        stage = int(target.split("layers.")[1].split(".")[0]) if ".encoder.encoder.layers." in target else 0
        bias, w = target.endswith("bias"), widths[stage]
        if "encoder.embeddings.patch" in target:
            return (96,) if bias else (96, 3, 4, 4)
        if "encoder.embeddings.norm" in target:
            return (96,)
        if "hidden_states_norms" in target:
            return (widths[int(target.split("stage")[1][0]) - 1],)
        if ".encoder.encoder.layers." in target:
            table = {"attention.self.*": (3 * w, w), "attention.output": (w, w), "intermediate": (4 * w, w),
                     "output.dense": (w, 4 * w), "downsample.reduction": (2 * w, 4 * w)}  # fmt: skip
            if "table" in target:
                return (169, heads[stage])
            if "downsample.norm" in target:
                return (4 * w,)
            for part, full in table.items():
                if part in target:
                    return full[:1] if bias else full
            return (w,)
        table = {"input_projections.0.0": (256, 768, 1, 1), "input_projections.1.0": (256, 384, 1, 1),
                 "input_projections.2.0": (256, 192, 1, 1), "adapter_1.0": (256, 96, 1, 1),
                 "layer_1.0": (256, 256, 3, 3), "mask_projection": (256, 256, 1, 1), "sampling_offsets": (192, 256),
                 "attention_weights": (96, 256), "level_embed": (3, 256), "queries": (100, 256),
                 "class_predictor": (81, 256), "in_proj": (768, 256), "self_attn.*_proj": (768, 256),
                 "mask_embedder": (256, 256), "proj": (256, 256)}  # fmt: skip
        if "norm" in target or ".1.weight" in target[-9:] or ".1.bias" in target[-7:]:
            return (256,)
        hidden = 1024 if "decoder.encoder" in target else 2048
        if ".fc1" in target:
            return (hidden,) if bias else (hidden, 256)
        if ".fc2" in target:
            return (256,) if bias else (256, hidden)
        for part, full in table.items():
            if part in target:
                return full[:1] if bias else full
        raise AssertionError(target)

    return shape


def test_merged_patches_are_read_in_the_other_order():
    """mmdet unfolds channel by channel; transformers joins four neighbours: the same map afterwards."""
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    torch.manual_seed(0)
    norm, reduction = torch.nn.LayerNorm(20), torch.nn.Linear(20, 10, bias=False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 6, 8)
    unfolded = F.unfold(x, 2, stride=2).transpose(1, 2)  # as mmdet's PatchMerging
    expected = reduction(norm(unfolded))
    theirs = SwinPatchMerging(5)
    weights = {"norm.weight": norm.weight, "norm.bias": norm.bias, "reduction.weight": reduction.weight}
    theirs.load_state_dict({name: convert.by_position(value.detach()) for name, value in weights.items()})
    torch.testing.assert_close(theirs(x.flatten(2).transpose(1, 2), (6, 8)), expected)


def test_a_tensor_without_a_place_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"roi_head.bbox": torch.zeros(2)}}, tmp_path / "other.pth")
    assert convert.main([str(tmp_path / "other.pth"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "roi_head.bbox has no place" in error and error.count("\n") == 1
    torch.save({"state_dict": Path("x")}, tmp_path / "pickled.pth")
    assert convert.main([str(tmp_path / "pickled.pth"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- CLIP and DINOv2 -----------------------------------------------------------------------------------------------


def test_plain_gelu_is_refused(folders):
    with pytest.raises(InvalidInput, match="hidden_act 'gelu'; OpenAI's CLIP was trained with quick_gelu"):
        load_clip(folders["gelu"])


def test_embeddings_have_unit_length_and_are_the_models_own(folders):
    from transformers import CLIPModel

    judge_ = load_clip(folders["clip"])
    images, texts = fixed_pictures()[:2, :60, :90], ["a red cup", "b " * 200]
    pixels = pixels_of(images, 28, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
                       torch.device("cpu"))  # fmt: skip
    found, words = judge_.images(images), judge_.texts(texts)
    assert torch.allclose(found.norm(dim=1), torch.ones(2)) and torch.allclose(words.norm(dim=1), torch.ones(2))
    model = CLIPModel.from_pretrained(folders["clip"]).eval()
    ids = judge_.tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, **ids)
    torch.testing.assert_close(found, output.image_embeds)
    torch.testing.assert_close(words, output.text_embeds)
    cosine = (output.image_embeds * output.text_embeds).sum(1).clamp(min=0)
    np.testing.assert_allclose(clip_scores(judge_, images, texts), 100 * cosine.numpy(), rtol=1e-5)


def test_pictures_are_cut_to_their_middle_square():
    image = np.zeros((1, 40, 80, 3), np.uint8)
    image[:, :, 20:60] = 255
    pixels = pixels_of(image, 20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), torch.device("cpu"))
    assert pixels.shape == (1, 3, 20, 20) and pixels[..., 2:-2].min() == 1.0


def test_an_object_is_seen_alone_on_grey():
    image = np.full((10, 12, 3), 200, np.uint8)
    mask = np.zeros((10, 12), bool)
    mask[2:6, 3:8] = True
    mask[3, 4] = False
    alone = cut_out(image, Detection("cup", 0.9, (3.0, 2.0, 8.0, 6.0), mask=mask))
    assert alone.shape == (4, 5, 3) and (alone[1, 1] == 0x99).all() and (alone[0, 0] == 200).all()


def test_colours_are_the_nearest_of_ten_names_over_three_templates(folders):
    judge_ = load_clip(folders["clip"])
    image, mask = fixed_pictures()[0], np.zeros((256, 256), bool)
    mask[60:160, 40:150] = True
    detection = Detection("cup", 0.9, (40.0, 60.0, 150.0, 160.0), mask=mask)
    scores = {}
    for color in COLORS:
        words = judge_.texts([f"a photo of a {color}{rest}" for rest in (" cup", "-colored cup", " object")])
        scores[color] = float(F.normalize(words.mean(0), dim=0) @ judge_.images(cut_out(image, detection)[None])[0])
    assert ColorClassifier(judge_).color(image, detection) == max(scores, key=lambda color: scores[color])


def test_dinov2_gives_its_class_token(folders):
    from transformers import Dinov2Model

    network = load_dinov2(folders["dinov2"])
    images = fixed_pictures()
    features = network(images)
    assert features.shape == (3, 16) and features.dtype == np.float32 and network(images[:0]).shape == (0, 16)
    pixels = pixels_of(images, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.device("cpu"))
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(folders["dinov2"]).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(features, hidden.numpy(), atol=1e-5)


def test_a_partly_random_judge_is_refused(folders, tmp_path):
    from safetensors.torch import save_file

    for name, message in (("config.json", "config.json"), ("model.safetensors", "safetensors")):
        broken = tmp_path / name.replace(".", "-")
        broken.mkdir()
        for path in folders["dinov2"].iterdir():
            if path.name != name:
                (broken / path.name).write_bytes(path.read_bytes())
        with pytest.raises(InvalidInput, match=message):
            load_dinov2(broken)
    weights = on_disk(folders["dinov2"])
    first = sorted(weights)[0]
    del weights[first]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=f"1 missing keys, first .*{first.rpartition('.')[2]}"):
        load_dinov2(broken)
    with pytest.raises(InvalidInput, match="describes Dinov2Model, expected CLIPModel"):
        load_clip(folders["dinov2"])
