"""The figures of an evaluation, beside their definitions and other implementations of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as their_lpips
from PIL import Image
from scipy.linalg import sqrtm
from stand_ins import save_alexnet, save_clip, save_inception
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.kid import poly_mmd

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.evaluation.caption_files import read_captions
from asdm_compress.evaluation.clip import load_clip
from asdm_compress.evaluation.distances import (
    CMMD_SCALE,
    Frechet,
    InceptionScore,
    Kernel,
    Moments,
    PairedKernel,
    estimates,
    frechet_distance,
    gaussian,
    kernel_distance,
    precision_and_recall,
)
from asdm_compress.evaluation.fidelity import compare_pairs, ms_ssim, ms_ssim_scales, to_tensor
from asdm_compress.evaluation.inception import Inception, load_inception, resize_as_tensorflow
from asdm_compress.evaluation.lpips import load_lpips
from asdm_compress.evaluation.protocols import choose_rules
from asdm_compress.evaluation.record import load_evaluation
from asdm_compress.evaluation.viewing import Viewing
from asdm_compress.scenes.captions import Caption, ObjectClaim, SeenObject, SeenScene, sample_captions
from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scenes.verdict import judge
from asdm_compress.scenes.world import sample_scene

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(3)
    return rng.normal(size=(30, 6)), rng.normal(0.4, 1.3, size=(40, 6))


def test_frechet_distance_is_the_definition_for_many_and_for_few_images(sets):
    for first, second in (sets, (sets[0][:5], sets[1])):
        a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
        mean = first.mean(0) - second.mean(0)
        expected = mean @ mean + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_is_torchmetrics_polynomial_mmd(sets):
    first, second = sets[0], sets[1][:30]
    ours = kernel_distance(first, second)
    assert ours == pytest.approx(float(poly_mmd(torch.from_numpy(first), torch.from_numpy(second))), rel=1e-6)


def test_kernel_distance_has_no_bias():
    """Of equal distributions it is zero on average, on either side; the biased one never is."""
    rng = np.random.default_rng(5)
    pairs = [(rng.normal(size=(12, 4)), rng.normal(size=(12, 4))) for _ in range(200)]
    found = np.array([kernel_distance(a, b) for a, b in pairs])
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(len(found))
    assert min(Kernel(b, unbiased=False).value(a) for a, b in pairs) > 0


def test_the_kernel_distance_of_pairs_has_no_bias_either():
    """Of partners that are alike it is zero, where that of two sets is below it; what is apart it sees."""
    rng = np.random.default_rng(6)
    found, of_sets = [], []
    for _ in range(200):
        image = rng.normal(size=(12, 4))
        partner = image + 0.1 * rng.normal(size=image.shape)
        found.append(PairedKernel(partner).value(image))
        of_sets.append(kernel_distance(image, partner))
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))
    assert np.mean(of_sets) < -10 * np.std(of_sets) / np.sqrt(len(of_sets))
    same = rng.normal(size=(20, 4))
    assert PairedKernel(same).value(same) == pytest.approx(0, abs=1e-12)
    apart = PairedKernel(same + 1)
    assert (apart.counted(20), apart.counted(30_000)) == (20, 4_000)
    assert apart.value(same) > 3 * apart.resampled(same).std() > 0


def test_cmmd_is_its_definition(sets):
    x, y = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in sets)

    def k(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200).mean()

    expected = 1000 * (k(x, x) + k(y, y) - 2 * k(x, y))
    assert Kernel(y, gaussian, False, CMMD_SCALE).value(x) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_are_the_definition(sets):
    images, reference = sets[0][:12], sets[1][:15]

    def radius(points, i):
        return sorted(np.linalg.norm(points - points[i], axis=1))[3]

    def among(points, others):
        return [any(np.linalg.norm(p - o) <= radius(others, j) for j, o in enumerate(others)) for p in points]

    precision, recall = precision_and_recall(images, reference)
    assert precision.tolist() == among(images, reference)
    assert recall.tolist() == among(reference, images)


def test_inception_score_is_the_definition(sets):
    logits = sets[0] * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert InceptionScore().value(logits) == pytest.approx(expected, rel=1e-9)
    # With as many images as it is published for: the mean over ten parts, each less than the whole.
    many = np.random.default_rng(0).normal(size=(100, 5))
    parts = [InceptionScore().value(part) for part in np.split(many, 10)]
    assert InceptionScore().value(many) == pytest.approx(np.mean(parts))
    # Where they do not divide, as published: from i n // 10 to (i + 1) n // 10.
    more = np.random.default_rng(1).normal(size=(102, 5))
    parts = [InceptionScore().value(more[i * 102 // 10 : (i + 1) * 102 // 10]) for i in range(10)]
    assert InceptionScore().value(more) == pytest.approx(np.mean(parts))


@pytest.mark.parametrize("unbiased", [True, False])
def test_resampled_distances_spread_as_new_samples_do(unbiased):
    rng = np.random.default_rng(8)
    reference = rng.normal(size=(200, 4))
    for distance in (Kernel(reference, unbiased=unbiased), Frechet(Moments.of(reference))):
        fresh = [distance.value(rng.normal(0.7, 1, size=(60, 4))) for _ in range(200)]
        resampled = distance.resampled(rng.normal(0.7, 1, size=(60, 4)))
        assert 0.5 < resampled.std() / np.std(fresh) < 2
    teacher = rng.normal(0.7, 1, size=(60, 4))
    first, second, change = estimates(Kernel(reference, unbiased=unbiased), teacher, teacher + 0.01)
    assert change.value == pytest.approx(second.value - first.value)
    assert change.high - change.low < 0.2 * (first.high - first.low)  # paired


def test_ms_ssim_takes_the_scales_that_fit():
    assert [ms_ssim_scales(side) for side in (8, 16, 24, 128, 176, 512)] == [0, 1, 2, 4, 5, 5]
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(128, 128, 3, generator=generator) * 255).byte().numpy()
    image, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    assert ms_ssim([image], [image]) == [pytest.approx(1)]
    assert ms_ssim([image], [other])[0] < 0.1
    for side in (16, 24):
        small = image.resize((side, side))
        assert ms_ssim([small], [small]) == [pytest.approx(1)]
    assert ms_ssim([image.resize((8, 8))], [image.resize((8, 8))]) is None


@pytest.mark.parametrize("side", [16, 40, 128])
def test_ssim_is_that_of_another_library(side):
    rng = np.random.default_rng(side)
    flat = np.full((3, side, side, 3), 0.7)
    flat[0], flat[1, : side // 2] = rng.random((side, side, 3)), 0.2
    pixels = [flat, np.clip(flat + 0.1 * rng.normal(size=flat.shape) * [[[[1]]], [[[1]]], [[[0.01]]]], 0, 1)]
    ours, theirs = ([Image.fromarray((255 * p).astype(np.uint8)) for p in some] for some in pixels)
    a, b = to_tensor(ours).double(), to_tensor(theirs).double()
    psnr, ssim = compare_pairs(ours, theirs)
    oracle = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert psnr == pytest.approx(oracle.tolist(), abs=1e-5)
    oracle = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert ssim == pytest.approx(oracle.tolist(), abs=1e-9)
    count = ms_ssim_scales(side)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:count]
    oracle = multiscale_structural_similarity_index_measure(
        a, b, data_range=1.0, betas=tuple(w / sum(weights) for w in weights), normalize="relu", reduction="none"
    )
    assert ms_ssim(ours, theirs) == pytest.approx(oracle.tolist(), abs=1e-6)


def test_verdicts_count_claims_one_by_one():
    caption = Caption(
        "",
        (ObjectClaim("circle", "red", "small", (0, 0)), ObjectClaim("ring", "blue", None)),
        ((0, "above", 1),),
        "white",
    )
    seen = SeenScene(
        "grey", (SeenObject("ring", "blue", "large", 24, 104), SeenObject("circle", "red", "large", 24, 24))
    )
    verdict = judge(caption, seen)
    assert not verdict.holds
    right = {"count": 1, "shape": 2, "colour": 2, "size": 0, "place": 1, "relation": 1, "background": 0}
    assert verdict.right == right
    assert verdict.of == {"count": 1, "shape": 2, "colour": 2, "size": 1, "place": 1, "relation": 1, "background": 1}
    nothing = judge(caption, SeenScene("white", ()))
    assert sum(nothing.right.values()) == nothing.right["background"] == 1


def test_rendered_scenes_are_right_in_everything():
    rng = np.random.default_rng(2)
    from asdm_compress.scenes.captions import caption_of

    scenes = [sample_scene(rng, n, held_out=True) for n in (1, 2, 3) for _ in range(4)]
    verdicts = [
        judge(caption_of(scene, rng, complete=True), seen)
        for scene, seen in zip(scenes, load_reader().read(draw_scenes(scenes)), strict=True)
    ]
    assert all(verdict.holds for verdict in verdicts)
    assert all(verdict.right == verdict.of for verdict in verdicts)
    other = sample_captions(12, 99)
    wrong = [judge(c, seen) for c, seen in zip(other, load_reader().read(draw_scenes(scenes)), strict=True)]
    assert not any(verdict.holds for verdict in wrong)


def test_inception_reads_its_own_file_and_no_other(tmp_path):
    path = save_inception(tmp_path / "inception.pth")
    network = load_inception(path, CPU)
    # torch-fidelity 0.4.0's network has as many weights, by the same names.
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert {"Mixed_7c.branch3x3dbl_3b.bn.running_var", "Mixed_5b.branch_pool.conv.weight"} <= set(network.state_dict())
    images = (torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0)) * 255).byte()
    features, logits = network(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert torch.isfinite(features).all()
    alexnet = save_alexnet(tmp_path / "alexnet.pth")
    with pytest.raises(AsdmError, match="is not the Inception network") as caught:
        load_inception(alexnet, CPU)
    assert "weights-inception-2015-12-05" in caught.value.hint
    (tmp_path / "broken.pth").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AsdmError, match="cannot be read as weights"):
        load_inception(tmp_path / "broken.pth", CPU)


def test_inception_is_torch_fidelitys(tmp_path):
    """Oracle: torch-fidelity itself, where it is installed with the torchvision that it imports."""
    theirs = pytest.importorskip("torch_fidelity", exc_type=ImportError)
    path = save_inception(tmp_path / "inception.pth")
    names = ["2048", "logits_unbiased"]
    oracle = theirs.FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(path))
    images = (torch.rand(2, 3, 256, 200, generator=torch.Generator().manual_seed(0)) * 255).byte()
    for ours, expected in zip(load_inception(path, CPU)(images), oracle(images), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_images_are_resized_as_in_tensorflow():
    """Its places have no half pixel: a ramp stays the ramp i · in / out, up to the last input pixel."""
    ramp = torch.arange(10.0).expand(1, 1, 10, 10)
    expected = (torch.arange(25.0) * 10 / 25).clamp(max=9)
    found = resize_as_tensorflow(ramp, 25)
    assert torch.allclose(found[0, 0, 3], expected)
    assert torch.equal(resize_as_tensorflow(ramp, 10), ramp)


def test_lpips_is_torchmetrics(tmp_path, monkeypatch):
    """Oracle: torchmetrics' LPIPS on the same backbone, which it would take from torchvision."""
    metric = load_lpips(save_alexnet(tmp_path / "alexnet.pth"), CPU)
    monkeypatch.setattr(their_lpips, "_get_tv_model_features", lambda *_, **__: metric.features)
    oracle = their_lpips._LPIPS(pretrained=True, net="alex", pnet_rand=True).eval()
    a, b = (torch.rand(3, 3, 64, 80, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with torch.no_grad():
        expected = oracle(a, b, normalize=True).reshape(-1)
    assert torch.allclose(metric(a, b), expected, rtol=1e-4)
    assert metric(a, a).abs().max() == 0
    with pytest.raises(AsdmError, match="is not torchvision's AlexNet or VGG16"):
        load_lpips(save_inception(tmp_path / "inception.pth"), CPU)


def test_clip_gives_unit_embeddings_and_wants_a_whole_folder(tmp_path):
    folder = save_clip(tmp_path / "clip")
    clip = load_clip(folder, CPU)
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    of_images, of_texts = clip.of_images(images), clip.of_texts(["a red circle", "a blue square " * 40])
    assert of_images.shape == of_texts.shape == (2, 24)
    assert torch.allclose(of_texts.norm(dim=1), torch.ones(2), atol=1e-5)
    assert not torch.allclose(of_images[0], of_images[1], atol=1e-3)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(AsdmError, match=r"preprocessor_config\.json is not in it"):
        load_clip(folder, CPU)


def test_captions_come_as_data_sets_publish_them(tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 5, "image_id": 3, "caption": "second of three"},
            {"id": 2, "image_id": 3, "caption": "A  cat\n"},
            {"id": 9, "image_id": 7, "caption": "a dog"},
        ],
    }
    files = {
        "coco.json": json.dumps(coco),
        "list.json": json.dumps(["a dog", {"caption": "A cat"}]),
        "table.tsv": "file_name\ttext\nb.jpg\ta dog\na.jpg\tA cat\n",
        "table.csv": 'file_name,text\nb.jpg,"a dog"\na.jpg,A cat\n',
        "table.CSV": "text\na dog\nA cat\n",
        "metadata.jsonl": '{"file_name": "b.jpg", "text": "a dog"}\n\n{"text": "A cat"}\n',
        "lines.txt": "a dog\n\nA cat\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_captions(tmp_path / name) == ["a dog", "A cat"], name
    (tmp_path / "lines.csv").write_text('caption\n"a dog\nruns"\nA cat\n')
    assert read_captions(tmp_path / "lines.csv") == ["a dog runs", "A cat"]
    records = {"image.json": [{"image": "a.jpg"}] * 2, "lists.json": [{"caption": ["a dog", "a hound"]}] * 2,
               "none.json": [{"caption": None}] * 2, "strings.json": {"annotations": ["a", "b"]}}  # fmt: skip
    for name, content in records.items():
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(AsdmError, match="damaged or of another kind"):
            read_captions(tmp_path / name)
    for name, text in {"x.json": "{}", "y.csv": "a,b\n1,2\n", "z.json": "[1, 2]", "one.tsv": "text\nalone\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AsdmError):
            read_captions(tmp_path / name)


def test_images_are_seen_as_the_protocol_says():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert Viewing().of(image).tobytes() == image.tobytes()
    smaller = image.resize((32, 32), Image.Resampling.BICUBIC)
    assert Viewing(32).of(image).tobytes() == smaller.tobytes()
    compressed = Viewing(32, 75).of(image)
    assert compressed.size == (32, 32)
    assert compressed.tobytes() != smaller.tobytes()


def test_a_protocols_departures_are_named():
    rules, departures = choose_rules("bk-sdm", {"images": 8, "steps": None})
    assert (rules.images, rules.steps, rules.sampler, rules.view_size) == (8, 25, "pndm", 256)
    assert departures[0] == "images: 8; published: 30000"
    assert choose_rules("own", {"images": 8})[1] == []
    with pytest.raises(AsdmError, match="unknown protocol"):
        choose_rules("coco", {})


def test_damaged_records_are_refused(tmp_path):
    path = tmp_path / "eval.json"
    for text, words in (
        ("{", "cannot be read"),
        ('{"schema_version": 9}', "version 9"),
        ('{"schema_version": 1}', "model: Field required"),
    ):
        path.write_text(text)
        with pytest.raises(AsdmError, match=words) as caught:
            load_evaluation(path)
        assert caught.value.exit_code == ExitCode.USER


def test_networks_are_laid_out_in_full():
    with torch.device("meta"):
        assert len(Inception().state_dict()) == 94 * 6 + 2
