"""What `cocodiff generate` refuses once it knows the class of the pipeline, and once it is loaded."""

import inspect
import json

import pytest

from cocodiff.cli import loading
from cocodiff.cli.figures import RUN, STEP, describe, figures
from cocodiff.cli.loading import TINY_CLIP, check_class, check_sizes, load, pipeline_class, pixel_steps
from cocodiff.cli.request import Request, check_call
from cocodiff.errors import ConfigError
from cocodiff.observe.timeline import Span

PICTURE = {"image": "a.png"}
CASES = [  # family, options of the request, words; None where all is well
    ("flux", {}, None),
    ("flux", {"negative_prompt": "b", "true_cfg": 4.0}, None),
    ("flux", {"negative_prompt": "b"}, "--true-cfg above 1, which is 1 here"),
    ("flux", {"true_cfg": 4.0}, "only with a negative prompt"),
    ("flux", {"frames": 5}, "FluxPipeline does not take --frames. It takes --prompt, --steps"),
    ("flux", PICTURE | {"strength": 0.5}, None),
    ("flux", PICTURE | {"mask": "m.png"}, None),
    ("flux2", PICTURE, "there is none for --image"),
    ("flux2", {"true_cfg": 2.0}, "does not take --true-cfg"),
    ("sd3", {"negative_prompt": "b"}, None),
    ("sd3", {"negative_prompt": "b", "guidance": 1.0}, "--guidance above 1, which is 1 here"),
    ("sd3", {"true_cfg": 2.0}, "does not take --true-cfg"),
    ("qwen", {"negative_prompt": "b"}, None),
    ("qwen", {"negative_prompt": ""}, "makes no token of an empty text"),
    ("wan", {"frames": 5}, None),
    ("wan", PICTURE, None),
    ("wan", PICTURE | {"strength": 0.5}, "WanImageToVideoPipeline does not take --strength"),
    ("wan", PICTURE | {"mask": "m.png"}, "there is none for --image and --mask"),
]


def _request(family, options):
    return Request(prompt="a", model=f"tiny:{family}", **options)


@pytest.mark.parametrize("family, options, words", CASES)
def test_what_a_pipeline_does_not_take_is_refused_by_name(monkeypatch, family, options, words):
    monkeypatch.setattr(loading, "find_spec", lambda name: name)

    def check():
        request = _request(family, options)
        return check_class(request, pipeline_class(request))

    if words is None:
        assert check() == (family == "wan")
    else:
        with pytest.raises(ConfigError, match=words):
            check()


def test_a_package_that_diffusers_would_miss_later_is_asked_for(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="WanImageToVideoPipeline needs ftfy: pip install"):
        request = _request("wan", PICTURE)
        check_class(request, pipeline_class(request))


def test_what_a_pipeline_needs_is_asked_for():
    def call(prompt, image, height=None, **more): ...

    parameters = dict(inspect.signature(call).parameters)
    with pytest.raises(ConfigError, match="^New needs --image.$"):
        check_call("New", parameters, {"prompt": "a"})
    check_call("New", parameters, {"prompt": "a", "image": 1})


@pytest.mark.parametrize("family, multiple", [("flux", 4), ("flux2", None), ("sd3", None), ("qwen", None), ("wan", 16)])
def test_only_what_was_given_reaches_a_call_and_sizes_are_the_models(family, multiple):
    request = _request(family, {})
    assert request.call == {"prompt": "a", "num_inference_steps": 28}
    pipe = load(request, pipeline_class(request))
    step, most = pixel_steps(pipe)
    assert multiple in (None, step)
    good = {"height": 2 * step, "width": 3 * step} | ({"num_frames": 5} if family == "wan" else {})
    check_sizes(request, pipe, good)
    for call, words in (
        ({"height": 2 * step + 1}, f"--height {2 * step + 1}: .* multiple of {step}. Use {2 * step} or {3 * step}"),
        ({"width": step - 1}, f"Use {step}"),
        ({"width": (most or 0) + step}, "at most"),
    ):
        if words != "at most" or most is not None:
            with pytest.raises(ConfigError, match=words):
                check_sizes(request, pipe, call)
    if family == "wan":
        check_sizes(request, pipe, TINY_CLIP)
        with pytest.raises(ConfigError, match="1 more than a multiple of 4. Use 5 or 9"):
            check_sizes(request, pipe, {"num_frames": 6})


def test_guidance_that_the_model_ignores_is_refused():
    request = _request("flux", {})
    with pytest.raises(ConfigError, match="--guidance: .* would ignore it. .* --true-cfg"):
        check_sizes(request, load(request, pipeline_class(request)), {"guidance_scale": 3.5})
    request = _request("sd3", {})
    check_sizes(request, load(request, pipeline_class(request)), {"guidance_scale": 3.5})


def test_inpainting_draws_what_the_prompt_says():
    """diffusers' own strength of 0.6 keeps much of the picture under the mask."""
    masked = _request("flux", PICTURE | {"mask": "m.png"})
    assert masked.call["strength"] == 1.0 and "strength" not in _request("flux", PICTURE).call


@pytest.mark.parametrize(
    "index, words",
    [
        ("{", "cannot be loaded"),
        ("[]", "names no pipeline"),
        ("{}", "names no pipeline"),
        ('{"_class_name": "NoSuchPipeline"}', "names no pipeline of diffusers .NoSuchPipeline"),
        ('{"_class_name": "StableDiffusionPipeline"}', "cocodiff cannot wrap StableDiffusionPipeline. Supported"),
        ('{"_class_name": "FluxPipeline"}', None),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(tmp_path, index, words):
    request = Request(prompt="a", model=str(tmp_path))
    with pytest.raises(ConfigError, match="--model .*cannot be loaded"):
        pipeline_class(request)
    (tmp_path / "model_index.json").write_text(index)
    if words is not None:
        with pytest.raises(ConfigError, match=f"--model .*{words}"):
            pipeline_class(request)
        return
    found = pipeline_class(request)
    with pytest.raises(ConfigError, match="--model .*cannot be loaded") as caught:
        load(request, found)
    assert "\n" not in str(caught.value)


def _chain(*kinds):
    """An error as diffusers raises it: of a missing file, while it handled these, the last one first."""
    error = None
    for kind in reversed(kinds):
        one = kind("lower down")
        one.__context__, error = error, one
    last = OSError("owner/name does not appear to have a file named model_index.json.")
    last.__context__ = error
    return last


def _error(name, base=OSError):
    return type(name, (base,), {})


MISSING = _error("EntryNotFoundError")
HUB = [  # errors below diffusers' own -> words; None where the hub is not to blame
    ([_error("LocalEntryNotFoundError", MISSING)], "the hub cannot be reached, and the model is not.*HF_HOME=.*: hf d"),
    ([MISSING, _error("OfflineModeIsEnabled", ConnectionError)], "hf download owner/name"),
    ([_error("ConnectTimeout", _error("TransportError", Exception))], "hf download owner/name"),
    ([ConnectionRefusedError], "hf download owner/name"),
    ([_error("GatedRepoError")], "the model is gated.*https://huggingface.co/owner/name, then: hf auth login"),
    ([MISSING], None),
    ([], None),
]


@pytest.mark.parametrize("below, words", HUB)
def test_a_hub_that_is_not_reached_is_not_a_missing_file(below, words):
    with pytest.raises(ConfigError, match=words or "cannot be loaded .OSError: owner/name does not appear") as caught:
        with loading._as_config_error("owner/name"):
            raise _chain(*below)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("--verbose says more.") and isinstance(caught.value.__cause__, OSError)
    assert (words is None) == ("model_index.json" in said), said


def test_a_hub_that_is_switched_off_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, and the model is not"):
        with loading._as_config_error("owner/name"):
            raise _chain(HUB[0][0][0])


def test_control_of_a_folder_the_hub_is_not_blamed(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"), loading._as_config_error(str(tmp_path)):
        raise _chain(ConnectionError)


def test_a_folder_starts_from_a_picture_by_the_class_for_that(tmp_path):
    def named(name, **options):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        return pipeline_class(Request(prompt="a", model=str(tmp_path), **options)).__name__

    assert named("FluxPipeline", image="a.png") == "FluxImg2ImgPipeline"
    assert named("FluxPipeline", image="a.png", mask="m.png") == "FluxInpaintPipeline"
    assert named("WanImageToVideoPipeline", image="a.png") == "WanImageToVideoPipeline"
    with pytest.raises(ConfigError, match="WanPipeline takes no --image"):
        named("WanPipeline", image="a.png")


def test_figures_of_a_call_and_their_words():
    own = [Span("", STEP, at, at) for at in (2.0, 2.5, 3.0)] + [Span("", RUN, 0.0, 4.0)]
    session = [Span("compute", "wait v", 1.0, 2.0), Span("node", "v", 0.0, 2.0)]
    found = figures(own, session)
    assert (found.steps, found.first, found.step, found.decode, found.waiting) == (3, 2.0, 0.5, 1.0, 0.25)
    assert "25% waiting" in describe(found, 1.0)
    assert figures([own[-1]], None).step is None and figures(own[2:], None).step is None
    assert describe(figures([own[-1]], None), 1.0) == "seconds: start and load 1.0; drawn in 4.0"
