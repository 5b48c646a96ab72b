"""Image classifiers as judges: labels, batches, what is refused."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_robust.metrics.image_judges import ImageJudge, as_uint8

transformers_vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
LABELS = {0: "red", 1: "green", 2: "blue"}


class Brightest(torch.nn.Module):
    """Logit of each label: ten times the mean of its colour, as the classifier's pixels have it."""

    def __init__(self, labels=LABELS, problem_type=None, bias=0.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(10.0))
        self.config = ViTConfig(id2label=labels, problem_type=problem_type)
        self.bias, self.sizes = bias, []

    def forward(self, pixel_values):
        self.sizes.append(len(pixel_values))
        logits = self.scale * (pixel_values.mean(dim=(2, 3))[:, : len(self.config.id2label)] + self.bias)
        return type("Output", (), {"logits": logits})


def processor():
    return transformers_vit.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0]
    )


def pictures(*channels, size=16):
    found = torch.zeros(len(channels), 3, size, size)
    for row, channel in enumerate(channels):
        found[row, channel] = 1.0
    return found


def test_labels_and_hits_of_plain_colours():
    judge = ImageJudge(Brightest(), processor(), label="green")
    images = pictures(0, 1, 2, 1)
    assert judge.labels(images) == ["red", "green", "blue", "green"]
    assert judge(images).tolist() == [False, True, False, True]
    # logits 10, 0, 0: e^10 / (e^10 + 2)
    assert judge.probabilities(images)[0, 0].item() == pytest.approx(22026.4658 / 22028.4658)
    assert judge(as_uint8(images)).tolist() == [False, True, False, True]
    assert judge(images[:0]).tolist() == []


@pytest.mark.parametrize("label", ["green", 1, "1"])
def test_a_label_by_name_or_number(label):
    judge = ImageJudge(Brightest(), processor(), label=label)
    assert (judge.label, judge.label_id) == ("green", 1)
    assert judge.settings == {"model": "Brightest", "label": "green", "label_id": 1}


@pytest.mark.parametrize("label", ["gren", 3, -1, True, None, "3"])
def test_an_unknown_label_is_told_the_known_ones(label):
    with pytest.raises(
        ValueError, match=r"it has 3: 'red', 'green', 'blue'\. Give a name or a number below 3"
    ) as error:
        ImageJudge(Brightest(), processor(), label=label)
    assert ("Did you mean 'green'" in str(error.value)) == (label == "gren")


def test_a_long_list_of_labels_is_cut():
    with pytest.raises(ValueError, match=r"it has 1000: 'name 0', .*'name 19', …\."):
        ImageJudge(Brightest({index: f"name {index}" for index in range(1000)}), processor(), label="nothing alike")


def test_batches_do_not_change_what_is_seen():
    model = Brightest()
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = ImageJudge(model, processor(), label=0, batch_size=2).probabilities(images)
    assert model.sizes == [2, 2, 1]
    torch.testing.assert_close(small, ImageJudge(model, processor(), label=0).probabilities(images))


@pytest.mark.parametrize("labels", [{0: "red"}, LABELS])
def test_independent_labels_say_yes_from_one_half(labels):
    """Red pictures have logit 10 · (1 − 0.5) for red and 10 · (0 − 0.5) elsewhere."""
    judge = ImageJudge(Brightest(labels, "multi_label_classification", bias=-0.5), processor(), label="red")
    assert judge(pictures(0, 1)).tolist() == [True, False]
    assert judge.probabilities(pictures(0))[0, 0].item() == pytest.approx(1 / (1 + 2.718281828**-5))


def test_folders_and_their_processor(tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        id2label=LABELS, label2id={name: index for index, name in LABELS.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).train().save_pretrained(tmp_path / "shapes")
    with pytest.raises(OSError, match="preprocessor_config.json"):
        ImageJudge(tmp_path / "shapes", label="red")
    processor().save_pretrained(tmp_path / "shapes")
    judge = ImageJudge(str(tmp_path / "shapes"), label="red")
    assert judge.settings["model"] == "shapes"  # not the path of a machine
    assert not judge.model.training
    assert judge.probabilities(pictures(0, 1)).shape == (2, 3)


def test_pictures_are_rounded_as_png_would():
    images = torch.full((1, 3, 2, 2), 0.5)
    assert as_uint8(images).unique().tolist() == [128]  # 127.5 rounds to even
    assert as_uint8(images * 4).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        ([1], "list"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((1, 3, 8, 8), float("nan")), "not finite"),
    ],
)
def test_what_is_no_picture_is_refused(images, named):
    with pytest.raises(ValueError, match=named):
        as_uint8(images)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="`processor=None`"):
        ImageJudge(Brightest(), label="red")
    with pytest.raises(ValueError, match="`batch_size=0`"):
        ImageJudge(Brightest(), processor(), label="red", batch_size=0)
    with pytest.raises(OSError, match="no folder or Hub id of an image classifier"):
        ImageJudge(tmp_path / "nothing", label="red")
    judge = ImageJudge(Brightest(bias=float("nan")), processor(), label="red")
    with pytest.raises(ValueError, match="not finite"):
        judge(pictures(0))
