"""GrabCut from a box, and a small random SAM 2 made on the spot."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2Config, Sam2Model, Sam2Processor
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig, Sam2VisionConfig

from crab.models.segment import Sam2, grabcut, segmenter

SIDE = 64


def noise(height=SIDE, width=SIDE):
    return np.random.default_rng(3).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_grabcut_finds_a_disc_in_its_box_always_alike():
    y, x = np.mgrid[:96, :96]
    truth = (x - 48) ** 2 + (y - 40) ** 2 < 20**2
    image = np.where(truth[..., None], [200, 40, 40], [60, 90, 120]) + noise(96, 96) // 16
    image = image.astype(np.uint8)
    prompt = (24, 16, 72, 64), [(48, 40), (40, 40), (56, 40)]
    mask = grabcut(image, *prompt)
    assert mask.dtype == bool and (mask & truth).sum() / (mask | truth).sum() > 0.95
    assert not mask[:16].any() and not mask[64:].any()
    grabcut(image[::-1].copy(), (0, 0, 50, 50))  # draws from OpenCV's random numbers
    assert (grabcut(image, *prompt) == mask).all()


def test_grabcut_falls_back_to_the_box():
    flat = np.full((64, 64, 3), 90, np.uint8)
    mask = grabcut(flat, (8, 8, 24, 16))
    assert mask.any() and mask[8:16, 8:24].sum() == mask.sum()
    assert grabcut(flat, (0, 0, 64, 64)).all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a SAM 2 with random weights that looks at 64 x 64 pixels."""
    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[SIDE, SIDE], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[4, 4, 2, 2], global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2])  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]])  # fmt: skip
    prompts = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16}
    masks = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    model = Sam2Model(config).eval()
    with torch.no_grad():
        for value in model.parameters():  # larger than before training, so that prompts matter
            value.add_(0.2 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("sam2")
    model.save_pretrained(folder)
    return folder


def test_sam2_is_called_as_transformers_says(checkpoint):
    """On an image of the size of the model nothing is resized or scaled: here the model is called by hand."""
    image, box, points = noise(), (8, 16, 40, 56), [(20, 30), (24, 40)]
    pixels = torch.tensor(image / 255 - [0.485, 0.456, 0.406]).float() / torch.tensor([0.229, 0.224, 0.225])
    model = Sam2Model.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        out = model(
            pixel_values=pixels.permute(2, 0, 1)[None], input_points=torch.tensor([[points]]).float(),
            input_labels=torch.ones(1, 1, 2, dtype=torch.long), input_boxes=torch.tensor([[box]]).float(),
            multimask_output=False)  # fmt: skip
        expected = torch.nn.functional.interpolate(out.pred_masks[:, 0], (SIDE, SIDE), mode="bilinear") > 0
    mask = segmenter(str(checkpoint))(image, box, points)
    assert mask.dtype == bool and mask.shape == (SIDE, SIDE) and 0 < mask.sum() < mask.size
    assert (mask == expected[0, 0].numpy()).all()


def test_sam2_takes_images_and_prompts_of_any_size(checkpoint):
    sam, image, points = segmenter(str(checkpoint)), noise(96, 160), [(50, 40), (60, 40), (60, 50)]
    assert sam is segmenter(str(checkpoint))
    mask = sam(image, (20, 10, 100, 80), points)
    assert mask.shape == (96, 160) and (sam(image, (20, 10, 100, 80), points) == mask).all()
    assert (sam(image, (20, 10, 100, 80)) != mask).any() and (sam(image, (100, 50, 150, 90), points) != mask).any()
    assert (sam(image, (-50, 10, 100, 80)) == sam(image, (0, 10, 100, 80))).all()


def test_boxes_without_area_and_images_of_a_wrong_type(checkpoint):
    for segment in (grabcut, segmenter(str(checkpoint))):
        for box in ((10, 10, 10, 20), (-9, 3, 0, 9), (170, 70, 190, 90), (30, 30, 20, 20)):
            assert not segment(noise(), box).any()
        with pytest.raises(ValueError, match="uint8"):
            segment(np.zeros((8, 8)), (0, 0, 4, 4))


def test_sam2_gets_the_inputs_that_its_processor_makes(checkpoint):
    """Against the coordinates of transformers' own processor, and a resize by Pillow."""
    image, box, points = noise(32, 48), (20, 10, 40, 30), [(25, 20), (30, 21)]
    inputs, scale = Sam2(str(checkpoint)).inputs(image, box, points), Sam2Processor._normalize_coordinates
    boxes = scale(None, SIDE, torch.tensor([box]), image.shape[:2], is_bounding_box=True)
    assert torch.allclose(inputs["input_boxes"][0], boxes)
    assert torch.allclose(inputs["input_points"][0, 0], scale(None, SIDE, torch.tensor(points), image.shape[:2]))
    resized = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(inputs["pixel_values"][0].permute(1, 2, 0).numpy() - expected).max() < 1.01 / 255 / 0.224


def test_what_is_no_whole_sam2_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="nowhere.*grabcut"):
        segmenter(str(tmp_path / "nowhere"))
    model = Sam2Model.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "iou_token" not in k})
    with pytest.raises(ValueError, match="1 weights are missing.*iou_token"):
        segmenter(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no SAM 2 can be loaded"):
        Sam2(str(tmp_path))


def test_no_torch_for_grabcut_and_never_torchvision(checkpoint):
    code = (
        "import sys; from crab.models import segment; segment.segmenter('grabcut'); assert 'torch' not in sys.modules;"
    )
    code += f"segment.segmenter({str(checkpoint)!r}); assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
