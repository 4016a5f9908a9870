"""The options of each command. The module of the same name holds what the command does; it is
imported when the command runs.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Literal, get_args

import typer
from typer import Option

import tiltjax
from tiltjax.cli._status import status

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ERRORS = (ValueError, TypeError, OSError, MemoryError, FloatingPointError, ImportError)
_Seed = Annotated[int, Option(min=0, max=2**32 - 1, metavar="N", help="Random seed.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tiltjax {tiltjax.__version__}")
        raise typer.Exit


@app.callback()
def tilt(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sample from rho(x) exp(scale * r(x)), for a flow or diffusion model rho and a reward r."""


@contextmanager
def _messages(interrupted: str) -> Iterator[None]:
    """End the command with one message for an error that the user can correct."""
    try:
        yield
    except _ERRORS as error:
        print(f"tiltjax: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"tiltjax: {interrupted}", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def demo(
    problem: Annotated[
        str, Option(help=f"One of {', '.join(tiltjax.problems.NAMES)}.")
    ] = "quadratic",
    list_problems: Annotated[
        bool, Option("--list", help="Describe the problems and stop.")
    ] = False,
    scale: Annotated[
        float | None,
        Option(help="Inverse temperature of the tilt.", show_default="the problem's"),
    ] = None,
    num: Annotated[int, Option(min=10, help="Number of samples of each method.")] = 1000,
    steps: Annotated[int, Option(min=1, help="Number of Heun steps of the flow.")] = 50,
    seed: _Seed = 0,
    output: Annotated[str, Option(help="File of the figure: .png, .pdf or .svg.")] = "tilt.png",
) -> None:
    """Sample one tilt with every method, and show how far each method lands from it.

    Prints a table of measured values beside those that theory predicts, and draws a figure.

    Examples:

        tiltjax demo
        tiltjax demo --problem double_well --scale 1 --output well.pdf
    """
    from tiltjax.cli import demo

    if list_problems:
        demo.print_problems()
        return
    with _messages("interrupted, no figure was written"):
        demo.run(problem, scale=scale, num=num, steps=steps, seed=seed, output=output)


# The options of `images`, in the panels of its help.
_of_model = partial(Option, rich_help_panel="Model")
_of_reward = partial(Option, rich_help_panel="Reward")
_of_method = partial(Option, rich_help_panel="Method")
_of_output = partial(Option, rich_help_panel="Output")
_of_computation = partial(Option, rich_help_panel="Computation")
_Reward = Literal[
    "blue",
    "blue-channel",
    "blue-minus-red-green",
    "brightness",
    "symmetry",
    "antisymmetry",
    "rotation",
    "palette",
    "clip",
]
_Method = Literal["none", "plug-in", "fmrg", "damped", "best-of-n", "conjugate", "weighted"]
_Model = Annotated[
    str,
    Option(
        help="A folder in the published layout, a name on the Hugging Face hub, or `tiny`, the "
        "small model that comes with tiltjax."
    ),
]
_Prompt = Annotated[str, Option(help="The text that the images show.")]
_Output = Annotated[str, Option(help="The folder of the images.")]
_Images = Annotated[int, Option(min=1, help="Number of images.")]
_Adapters = Annotated[
    str | None,
    _of_model(help="A safetensors file of low-rank adapters to merge, such as a flow map's."),
]
_Size = Annotated[
    str | None,
    _of_model(
        metavar="N|HxW",
        help="Height and width, multiples of 16.",
        show_default="512, or the size that a smaller model was trained on",
    ),
]
_Steps = Annotated[
    int | None,
    _of_model(min=1, help="Number of Euler steps.", show_default="28; with tiny and weighted 12"),
]
_Cfg = Annotated[
    float | None,
    _of_model(help="The distilled guidance scale.", show_default="3.5 where the model takes one"),
]
_RewardName = Annotated[
    _Reward, _of_reward(metavar="NAME", help=f"One of {', '.join(get_args(_Reward))}.")
]
_Scale = Annotated[
    float | None,
    _of_reward(
        help="Scale of the reward in the tilt: conjugate, weighted, and plug-in with --length 0.",
        show_default="1; measured for tiny",
    ),
]
_Region = Annotated[
    Literal["top-right", "center", "bottom"],
    _of_reward(help="The region that brightness compares with the rest of the image."),
]
_Palette = Annotated[
    str, _of_reward(help="The color of palette: a name, or R,G,B with values in [0, 1].")
]
_Clip = Annotated[
    str | None,
    _of_reward(
        help="The folder of a CLIP with both towers, for the reward clip.",
        show_default="the CLIP that comes with the model",
    ),
]
_MethodName = Annotated[
    _Method, _of_method(metavar="NAME", help=f"One of {', '.join(get_args(_Method))}.")
]
_Particles = Annotated[
    int | None,
    _of_method(
        min=1,
        help="Draws of plug-in and damped, candidates of best-of-n, particles of weighted.",
        show_default="1; best-of-n and weighted: 4; with tiny: 16 and 32",
    ),
]
_Length = Annotated[
    float | None,
    _of_method(
        min=0,
        help="Length to which each gradient is scaled; 0 leaves it and multiplies by --scale.",
        show_default="10; measured for tiny",
    ),
]
_SnrFactor = Annotated[
    float,
    _of_method(
        help="The factor by which added noise lowers the signal-to-noise ratio before a look ahead."
    ),
]
_Sigma = Annotated[
    float | None,
    _of_method(
        help="Width of the data, in units of a latent, for damped.",
        show_default="1; measured for tiny",
    ),
]
_Limit = Annotated[float, _of_method(help="Largest value of the coefficient (1 - t) / t.")]
_First = Annotated[int, _of_method(help="The first guided step, counted from 0.")]
_Guided = Annotated[int, _of_method(help="Number of guided steps.")]
_Compare = Annotated[
    bool | None,
    _of_output(
        "--compare/--no-compare",
        help="Also make the unguided images of the same seeds.",
        show_default="compare for tiny",
    ),
]
_Sheet = Annotated[
    bool,
    _of_output(
        "--sheet/--no-sheet", help="Write sheet.png, which shows the first images and rewards."
    ),
]
_Quiet = Annotated[bool, _of_output("--quiet", help="Do not show progress.")]
_ChunkSize = Annotated[
    int | None,
    _of_computation(min=1, help="Number of particles evaluated at once.", show_default="all"),
]
_Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    _of_computation(
        help="Type of parameters and computation.",
        show_default="float32 on a CPU, otherwise bfloat16",
    ),
]
_Remat = Annotated[
    bool,
    _of_computation(
        "--remat", help="Recompute blocks for the gradient: this takes less memory and more time."
    ),
]
_Attention = Annotated[
    Literal["xla", "cudnn"], _of_computation(help="cudnn, on a GPU, takes less memory.")
]


@app.command()
def images(
    model: _Model,
    prompt: _Prompt,
    output: _Output = "images",
    images: _Images = 1,
    seed: _Seed = 0,
    adapters: _Adapters = None,
    size: _Size = None,
    steps: _Steps = None,
    cfg: _Cfg = None,
    reward: _RewardName = "blue",
    scale: _Scale = None,
    region: _Region = "center",
    palette: _Palette = "ocean",
    clip: _Clip = None,
    method: _MethodName = "plug-in",
    particles: _Particles = None,
    length: _Length = None,
    snr_factor: _SnrFactor = 5.0,
    sigma: _Sigma = None,
    limit: _Limit = 20.0,
    first: _First = 1,
    guided: _Guided = 5,
    compare: _Compare = None,
    sheet: _Sheet = True,
    quiet: _Quiet = False,
    chunk_size: _ChunkSize = None,
    dtype: _Dtype = None,
    remat: _Remat = False,
    attention: _Attention = "xla",
) -> None:
    """Make images with FLUX.1, guided by a reward.

    Image i depends on the seed and on i alone. The same command continues an interrupted run.

    Methods:

    - none: samples of the model, without guidance
    - plug-in: guidance as published, with `--particles` draws
    - fmrg: plug-in without noise, one prediction along the flow map
    - damped: plug-in, damped with `--sigma`
    - best-of-n: the best of `--particles` samples
    - conjugate: variational conjugate tilting at `--scale`, without gradients of the network
    - weighted: one of `--particles` weighted particles (sequential Monte Carlo) at `--scale`

    Rewards:

    - blue: mean of B - (R + G) / 2, zero for every gray
    - blue-channel: mean of B, which is as high for white as for blue
    - blue-minus-red-green: mean of B - R - G, which is low for every bright color
    - brightness: brightness inside of `--region`, minus outside
    - symmetry, antisymmetry: minus and plus the squared difference from the mirror image
    - rotation: minus the squared difference from the image turned by half a turn
    - palette: minus the squared distance of the mean color from `--palette`
    - clip: similarity of image and prompt, by CLIP

    Examples:

        tiltjax images --model tiny --prompt "a red circle" --method conjugate --images 8
        tiltjax images --model FOLDER --prompt "a fox in the snow" --images 4 --output foxes
    """
    options = SimpleNamespace(**locals())
    with _messages("interrupted; the same command continues from here"), status(quiet=quiet) as say:
        say("starting")
        from tiltjax.cli import images as command

        command.run(options, say)
