"""float16 and autocast with every axis of the mesh, against one rank; and parts of a sequence without any image."""

import torch

from tests.distributed.helpers import degrees
from tests.distributed.ranks import run_ranks
from tests.families import family_call, family_pipeline
from tests.pipelines import flux_call, flux_pipeline, relative_error

MESHES = {"ulysses": (1, 1, 2), "ring": (1, 2, 1), "cfg": (2, 1, 1)}


def _call(dtype=torch.float32):
    """Arguments with guidance by two calls a step."""
    call = flux_call("text2image") | {"num_inference_steps": 2}
    return {name: x.to(dtype) if name.endswith("embeds") else x for name, x in call.items()}


def _errors():
    """Of each mesh: the distance from one rank, in units of the distance of one rank's float16 from its float32."""
    import cocodiff

    exact = flux_pipeline()(**_call()).images
    found = {}
    for how, dtype in (("float16", torch.float16), ("autocast", torch.float32)):
        pipe = flux_pipeline(dtype=dtype)
        with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
            alone = pipe(**_call(dtype)).images
            for name, mesh in MESHES.items():
                cocodiff.wrap(pipe, pieces=2, **degrees(mesh))
                together = pipe(**_call(dtype)).images
                cocodiff.unwrap(pipe)
                assert together.dtype == alone.dtype
                found[how, name] = relative_error(together, alone) / relative_error(alone, exact)
    return found


def test_float16_and_autocast_on_every_axis():
    for errors in run_ranks(2, _errors):
        assert max(errors.values()) < 2, errors  # two roundings, each of them a unit; a wrong picture is some hundreds


def _without_image():
    """SD3.5 on a ring of more ranks than the picture has tokens: one part has no row of its second attention."""
    import cocodiff

    def drawn(pipe):
        return pipe(**family_call("sd35 text2image", height=4, width=8, text_len=7)).images

    alone, wrapped = drawn(family_pipeline("sd35 text2image")), []
    for mesh in ((1, 4, 1), (1, 2, 2), (1, 1, 4)):
        pipe = cocodiff.wrap(family_pipeline("sd35 text2image"), **degrees(mesh))
        wrapped.append(drawn(pipe))
        cocodiff.unwrap(pipe)
    assert alone.shape[-2:] == (2, 4)  # latents, four a token
    return [relative_error(one, alone) for one in wrapped]


def test_fewer_image_tokens_than_parts():
    for errors in run_ranks(4, _without_image):
        assert max(errors) < 1e-5, errors
