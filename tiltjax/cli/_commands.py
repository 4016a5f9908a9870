"""The options of each command. What a command does is in the module of its name, imported when it
runs.
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
    """End the command with one message for an error that the user can mend."""
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
        bool, Option("--list", help="Describe the problems, and stop.")
    ] = False,
    scale: Annotated[
        float | None,
        Option(help="Inverse temperature of the tilt.", show_default="the problem's"),
    ] = None,
    num: Annotated[int, Option(min=10, help="Samples of each method.")] = 2000,
    steps: Annotated[int, Option(min=1, help="Heun steps of the flow.")] = 50,
    seed: _Seed = 0,
    output: Annotated[str, Option(help="The figure: .png, .pdf or .svg.")] = "tilt.png",
) -> None:
    """Sample one tilt with every method, and show how far each lands from it.

    Prints a table, measured values beside those that theory predicts, and draws a figure.

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
_of_computation = partial(Option, rich_help_panel="Computation")
_Reward = Literal[
    "blueness",
    "blue-minus-red-green",
    "blue-minus-half-red-green",
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
        help="A folder laid out as published, a name of the Hugging Face hub, or `tiny`, the "
        "small model that comes with tiltjax."
    ),
]
_Prompt = Annotated[str, Option(help="The text that the images show.")]
_Output = Annotated[str, Option(help="Folder of the images.")]
_Images = Annotated[int, Option(min=1, help="Number of images.")]
_Adapters = Annotated[
    str | None,
    _of_model(help="Safetensors of low-rank adapters to merge, such as those of a flow map."),
]
_Size = Annotated[
    str | None,
    _of_model(
        metavar="N|HxW",
        help="Multiples of 16.",
        show_default="512, or what a smaller model was trained on",
    ),
]
_Steps = Annotated[int, _of_model(min=1, help="Euler steps.")]
_Cfg = Annotated[
    float | None,
    _of_model(help="The distilled guidance scale.", show_default="3.5 where the model takes one"),
]
_RewardName = Annotated[
    _Reward, _of_reward(metavar="NAME", help=f"One of {', '.join(get_args(_Reward))}.")
]
_Scale = Annotated[float, _of_reward(help="Scale of the reward in weights and in the tilt.")]
_Region = Annotated[Literal["top-right", "center", "bottom"], _of_reward(help="For brightness.")]
_Palette = Annotated[str, _of_reward(help="For palette: its name, or one color R,G,B in [0, 1].")]
_Clip = Annotated[
    str | None,
    _of_reward(
        help="For clip: the folder of a CLIP with both towers.",
        show_default="the one that comes with the model",
    ),
]
_MethodName = Annotated[
    _Method, _of_method(metavar="NAME", help=f"One of {', '.join(get_args(_Method))}.")
]
_Particles = Annotated[
    int,
    _of_method(
        min=1,
        help="Draws of plug-in and damped, candidates of best-of-n, particles of weighted.",
    ),
]
_Length = Annotated[
    float,
    _of_method(help="Length of every gradient; 0: the gradient times the scale."),
]
_SnrFactor = Annotated[
    float, _of_method(help="Factor by which noise lowers the SNR before the look-ahead.")
]
_Sigma = Annotated[float, _of_method(help="Width of the damping, in units of a latent.")]
_Limit = Annotated[float, _of_method(help="Maximum of the coefficient (1 - t) / t.")]
_First = Annotated[int, _of_method(help="The first guided step, from 0.")]
_Guided = Annotated[int, _of_method(help="Number of guided steps.")]
_ChunkSize = Annotated[
    int | None,
    _of_computation(min=1, help="Particles evaluated at once.", show_default="all"),
]
_Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    _of_computation(
        help="Of parameters and computation.",
        show_default="float32 on a CPU, otherwise bfloat16",
    ),
]
_Remat = Annotated[
    bool,
    _of_computation(
        "--remat", help="Compute blocks again for the gradient: less memory, more time."
    ),
]
_Attention = Annotated[
    Literal["xla", "cudnn"], _of_computation(help="cudnn, on a GPU, takes less memory.")
]
_Quiet = Annotated[bool, _of_computation("--quiet", help="No progress bar.")]


@app.command()
def images(
    model: _Model,
    prompt: _Prompt,
    output: _Output = "images",
    images: _Images = 1,
    seed: _Seed = 0,
    adapters: _Adapters = None,
    size: _Size = None,
    steps: _Steps = 28,
    cfg: _Cfg = None,
    reward: _RewardName = "blueness",
    scale: _Scale = 1.0,
    region: _Region = "center",
    palette: _Palette = "ocean",
    clip: _Clip = None,
    method: _MethodName = "plug-in",
    particles: _Particles = 1,
    length: _Length = 10.0,
    snr_factor: _SnrFactor = 5.0,
    sigma: _Sigma = 1.0,
    limit: _Limit = 20.0,
    first: _First = 1,
    guided: _Guided = 5,
    chunk_size: _ChunkSize = None,
    dtype: _Dtype = None,
    remat: _Remat = False,
    attention: _Attention = "xla",
    quiet: _Quiet = False,
) -> None:
    """Make images of FLUX.1 guided by a reward.

    Image i depends on the seed and i alone. The same command continues an interrupted run.

    Methods:

    - none: a sample of the model
    - plug-in: guided as published, with `--particles` draws
    - fmrg: the same without noise, one prediction along the flow map
    - damped: plug-in, damped with `--sigma`
    - best-of-n: the best of `--particles` samples
    - conjugate: variational conjugate tilting at `--scale`, without gradients of the network
    - weighted: one of `--particles` weighted particles (sequential Monte Carlo) at `--scale`

    Examples:

        tiltjax images --model tiny --prompt "a red circle" --method weighted --particles 64
        tiltjax images --model FOLDER --prompt "a fox in the snow" --images 4 --output foxes
    """
    options = SimpleNamespace(**locals())
    with _messages("interrupted; the same command continues from here"):
        from tiltjax.cli import images as command

        command.run(options)
