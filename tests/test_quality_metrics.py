"""BRISQUE, FID and its relatives, against independent computations."""

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness.metrics import Scene, SetMeasure, load
from robustness.metrics.brisque import Regression, contrast_features
from robustness.metrics.quality import frechet_distance, kernel_distance
from shields.errors import ImageError, WeightsError
from shields.weights import WeightStore
from tests import tiny

CPU = torch.device("cpu")


def built(text, store=None):
    measure, _ = load(text, store=store or WeightStore(), device=CPU)
    return measure


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A store without any weights but the shipped ones."""
    for variable in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    return WeightStore(tmp_path)


# --- sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("photos", "others"), [(40, 30), (5, 4)])
def test_frechet_distance_is_the_one_by_the_root_of_a_matrix(photos, others):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    ours = rng.normal(size=(photos, 6)) @ rng.normal(size=(6, 6))
    theirs = rng.normal(0.5, 1, size=(others, 6))
    gap = ours.mean(0) - theirs.mean(0)
    first, second = (np.cov(part, rowvar=False) + 1e-9 * np.eye(6) for part in (ours, theirs))
    root = linalg.sqrtm(first @ second).real
    expected = gap @ gap + np.trace(first + second - 2 * root)
    assert frechet_distance(torch.tensor(ours), torch.tensor(theirs)) == pytest.approx(
        expected, rel=1e-3
    )


def test_frechet_distance_equals_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Nothing(torch.nn.Module):
        num_features = 8

        def forward(self, features):
            return features

    rng = torch.Generator().manual_seed(0)
    ours = torch.randn(50, 8, generator=rng, dtype=torch.float64)
    theirs = 1 + 2 * torch.randn(60, 8, generator=rng, dtype=torch.float64)
    judge = FrechetInceptionDistance(feature=Nothing())
    judge.update(theirs, real=True)
    judge.update(ours, real=False)
    assert frechet_distance(ours, theirs) == pytest.approx(float(judge.compute()), rel=1e-9)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_the_sum_over_pairs():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(4, 3)), rng.normal(1, 1, size=(5, 3))

    def mean(first, second, *, others_only):
        pairs = [
            (x @ y / 3 + 1) ** 3
            for i, x in enumerate(first)
            for j, y in enumerate(second)
            if i != j or not others_only
        ]
        return sum(pairs) / len(pairs)

    expected = mean(ours, ours, others_only=True) + mean(theirs, theirs, others_only=True)
    expected -= 2 * mean(ours, theirs, others_only=False)
    assert kernel_distance(torch.tensor(ours), torch.tensor(theirs)) == pytest.approx(expected)


def test_a_set_of_faces_has_one_number_whatever_its_batches():
    measure = built("fd:face-embedder@edits")
    assert isinstance(measure, SetMeasure)
    image, other = tiny.faces_image(6, 48, 1), tiny.faces_image(6, 48, 2)
    points = tiny.landmarks(6, 48)
    whole, parts = measure.start(), measure.start()
    whole.add(image, other, Scene(clean=other, landmarks=points))
    for row in range(0, 6, 2):
        two = slice(row, row + 2)
        keys = (f"{row}", f"{row + 1}")
        parts.add(image[two], other[two], Scene(clean=other[two], landmarks=points[two], keys=keys))
    assert whole.value() == pytest.approx(parts.value(), rel=1e-4)
    assert 0 < whole.value() <= measure.facts("edits").high
    alone = measure.start()
    alone.add(image[:1], other[:1], Scene(clean=other[:1]))
    with pytest.raises(ImageError, match="two photos"):
        alone.value()


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_inception_is_absent_where_its_file_is(name, empty, tmp_path):
    with pytest.raises(WeightsError, match=r"weights-inception-2015-12-05-6726825d.pth from https"):
        built(f"{name}@edits", empty)
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    with pytest.raises(WeightsError, match="is not the file"):
        built(f"{name}@edits", empty)


# --- BRISQUE -------------------------------------------------------------------------------------


def write_regression(folder, vectors=None, weights=(2.0, -1.0), rho=-3.0):
    """LIBSVM's text of a regression, as the authors of BRISQUE publish theirs."""
    vectors = np.linspace(-1, 1, 72).reshape(2, 36) if vectors is None else vectors
    lines = ["svm_type epsilon_svr", "kernel_type rbf", "gamma 0.05", "nr_class 2",
             f"total_sv {len(vectors)}", f"rho {rho}", "SV"]  # fmt: skip
    for weight, vector in zip(weights, vectors, strict=True):
        places = " ".join(f"{place}:{value:.12g}" for place, value in enumerate(vector, 1) if value)
        lines.append(f"{weight:.12g} {places} ")
    (folder / "allmodel").write_text("\n".join(lines) + "\n")
    rows = [f"{place} {-place} {2 * place}" for place in range(1, 37)]
    (folder / "allrange").write_text("x\n-1.000000 1.000000\n" + "\n".join(rows) + "\n")


def grey_levels(image):
    weighted = image.permute(1, 2, 0).double().numpy() * 255 @ np.array([0.2989, 0.587, 0.114])
    return weighted.round()


def test_contrast_features_are_those_of_an_independent_computation():
    pytest.importorskip("scipy")
    image = tiny.faces_image(1, 40, 3, width=52)
    image = (image + 0.05 * torch.randn(image.shape, generator=torch.manual_seed(0))).clamp(0, 1)
    grey = grey_levels(image[0])
    half = PillowImage.fromarray(grey.astype(np.float32)).resize(
        (26, 20), PillowImage.Resampling.BICUBIC
    )
    expected = [*own_features(grey), *own_features(np.array(half, dtype=np.float64))]
    ours = contrast_features(image)[0].numpy()
    assert ours.shape == (36,)
    assert ours == pytest.approx(np.array(expected), rel=2e-3, abs=2e-3)
    plain = contrast_features(image, "plain")[0].numpy()
    assert plain[:18] == pytest.approx(ours[:18])
    assert np.abs(plain[18:] - ours[18:]).max() > 0.05


def own_features(grey):
    """By SciPy, a search over the ratio of moments, and explicit neighbours."""
    from scipy.signal import convolve2d
    from scipy.special import gamma

    places = np.arange(-3, 4)
    window = np.exp(-(places[:, None] ** 2 + places**2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    mean = convolve2d(grey, window, mode="same")
    deviation = np.sqrt(np.abs(convolve2d(grey**2, window, mode="same") - mean**2))
    contrast = (grey - mean) / (deviation + 1)
    shapes = np.arange(0.2, 10.0005, 0.001)
    ratio = gamma(1 / shapes) * gamma(3 / shapes) / gamma(2 / shapes) ** 2
    wanted = (contrast**2).mean() / np.abs(contrast).mean() ** 2
    features = [shapes[np.abs(ratio - wanted).argmin()], (contrast**2).mean()]
    for down, right in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        product = contrast * np.roll(contrast, (down, right), axis=(0, 1))
        left = np.sqrt((product[product < 0] ** 2).mean())
        side = np.sqrt((product[product > 0] ** 2).mean())
        tilt = left / side
        wanted = np.abs(product).mean() ** 2 / (product**2).mean()
        wanted *= (tilt**3 + 1) * (tilt + 1) / (tilt**2 + 1) ** 2
        shape = shapes[np.abs(1 / ratio - wanted).argmin()]
        spread = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
        middle = (side - left) * gamma(2 / shape) / gamma(1 / shape) * spread
        features += [shape, middle, left**2, side**2]
    return features


def test_the_regression_scores_as_another_library_does(tmp_path):
    svm = pytest.importorskip("sklearn.svm")
    rng = np.random.default_rng(0)
    scaled, targets = rng.uniform(-1, 1, (30, 36)), rng.uniform(0, 100, 30)
    fitted = svm.SVR(gamma=0.05, C=100).fit(scaled, targets)
    write_regression(
        tmp_path, fitted.support_vectors_, fitted.dual_coef_[0], -float(fitted.intercept_[0])
    )
    low, high = -np.arange(1, 37), 2 * np.arange(1, 37)
    features = torch.tensor((scaled[:5] + 1) / 2 * (high - low) + low)
    scores = Regression.read(tmp_path)(features)
    assert scores.numpy() == pytest.approx(fitted.predict(scaled[:5]), abs=1e-6)


def test_brisque_is_absent_without_its_authors_files_and_refuses_damaged_ones(empty, tmp_path):
    with pytest.raises(WeightsError, match=r"allmodel.*BRISQUE_release.zip; tried"):
        built("brisque@edits", empty)
    folder = tmp_path / "brisque-live"
    folder.mkdir()
    write_regression(folder)
    image = tiny.faces_image(2, 40)
    score = built("brisque@edits", empty).measure(image, image, Scene(clean=image))
    assert score.isfinite().all()
    text = (folder / "allmodel").read_text()
    (folder / "allmodel").write_text(text.replace("total_sv 2", "total_sv 3"))
    with pytest.raises(WeightsError, match="2 of 3 support vectors"):
        built("brisque@edits", empty)
    (folder / "allmodel").write_text(text)
    (folder / "allrange").write_text("x\n-1 1\n1 0 1\n")
    with pytest.raises(WeightsError, match="ranges of 1 features"):
        built("brisque@edits", empty)


def test_a_black_image_has_no_naturalness(tmp_path):
    write_regression(tmp_path)
    black = torch.zeros(1, 3, 32, 32)
    assert (
        built(f"brisque:{tmp_path}@photo").measure(black, black, Scene(clean=black)).isnan().all()
    )


def test_a_batch_is_judged_as_its_photos_one_by_one(tmp_path):
    write_regression(tmp_path)
    measure = built(f"brisque:{tmp_path}@photo")
    image = tiny.faces_image(3, 48, 1)
    whole = measure.measure(image, image, Scene(clean=image))
    singles = [measure.measure(one, one, Scene(clean=one)) for one in image.split(1)]
    assert torch.allclose(whole, torch.cat(singles), atol=1e-5)
    assert whole.unique().numel() == 3
