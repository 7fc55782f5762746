"""The pictures of the notebook: diagram, image grid, losses, film, posteriors, sliders, listings.

Images are tensors (N, 1, 32, 32) with pixels in [0, 1]. Losses are one object an epoch, in nats per
image: with `.loss`, which is −ELBO, and, where a model's training tells them, with its parts
`.reconstruction` and `.kl`, and KL's parts `.information` and `.marginal_kl`.
"""

import base64
import html
import inspect
import io
import math
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import ipywidgets as widgets
import matplotlib
import numpy as np
import PIL.Image
import torch
from IPython import get_ipython
from IPython.display import Image, Markdown, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torchvision.utils import make_grid, save_image

LEAST = 1e-3  # nats, at the foot of the losses' logarithmic axis, which has no zero
FRAMES = 24  # of the film
STARTED = time.time()  # files that are younger may differ from what this kernel runs

Moment = namedtuple("Moment", "epoch losses decoded mu logvar")


@contextmanager
def default_settings():
    """Figures are made and saved with the settings that matplotlib comes with: those of a user
    could turn images upside down, or cut the frames of a film to different sizes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


@default_settings()
def image_grid(images, columns=10, rows=(), width=6.0):
    """A figure, `width` inches wide, of images (N, 1, H, W) in a grid, with a label beside each row
    if `rows` gives them."""
    grid = make_grid(images, nrow=columns, pad_value=1)[0]  # (H, W) of the whole grid
    height = width * len(grid) / len(grid[0])
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    pitch = images.shape[2] + 2  # an image's height and the white border
    axes.set_yticks([pitch * (row + 0.5) for row in range(len(rows))], rows)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.get_layout_engine().set(h_pad=0)  # so that grids of all heights start at one place
    return figure


@default_settings()
def diagram(x=None, x_hat=None):
    """A figure of a VAE: x → encoder → mu, sigma → z → decoder → D(z). Two images (1, 32, 32), `x`
    and `x_hat`, stand at its ends if they are given."""
    figure = Figure(figsize=(7, 1.6))
    axes = figure.add_axes([0, 0, 1, 1])
    axes.set(xlim=(0, 7), ylim=(0, 1.6))  # so that all places and lengths are in inches
    axes.axis("off")
    middle = 0.62
    arrow = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 0, "shrinkB": 0}
    for start, end in ((0.82, 1.1), (2.1, 2.38), (3.07, 3.35), (4.72, 5.0), (6.0, 6.22)):
        axes.annotate("", (end, middle), (start, middle), arrowprops=arrow)
    axes.annotate("", (4.46, middle + 0.16), (4.46, 1.22), arrowprops=arrow)  # to the ε of z
    for left, name, colour in ((1.18, "encoder", "#cfe3f3"), (5.08, "decoder", "#fbe0c3")):
        corner = (left, middle - 0.27)
        box = FancyBboxPatch(corner, 0.84, 0.54, "round,pad=0.08", fc=colour, ec="0.35")
        axes.add_patch(box)
        axes.text(left + 0.42, middle, name, ha="center", va="center")
    symbols = {"size": 13, "ha": "center", "va": "center"}
    axes.text(2.72, middle, r"$\mu,\ \sigma$", **symbols)
    axes.text(4.03, middle, r"$z = \mu + \sigma\,\varepsilon$", **symbols)
    axes.text(4.46, 1.38, r"$\varepsilon \sim \mathcal{N}(0, I)$", **symbols)
    for centre, image, symbol in ((0.44, x, "$x$"), (6.59, x_hat, "$D(z)$")):
        if image is None:
            axes.text(centre, middle, symbol, **symbols)
        else:
            axes.text(centre, middle + 0.5, symbol, **symbols)
            place = [(centre - 0.34) / 7, (middle - 0.34) / 1.6, 0.68 / 7, 0.68 / 1.6]
            picture = figure.add_axes(place, xticks=[], yticks=[])
            picture.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    return figure


@default_settings()
def plot_losses(losses, mean_image=None, n=None, title=""):
    """A figure of the losses per epoch, pale, each with its mean over the last 2 % of epochs,
    strong: left −ELBO, reconstruction and KL; right, if the losses tell them, KL's two parts.

    Two dotted lines help to read them. A model that ends above the −ELBO of the mean image, which
    `mean_image` gives in nats, has learnt nothing; and ln n is the most that information can be
    for `n` images.
    """
    names = {"−ELBO": "loss", "reconstruction": "reconstruction", "KL": "kl"}
    names = {label: name for label, name in names.items() if hasattr(losses[0], name)}
    parts = {"information": "information", "marginal KL": "marginal_kl"}
    parts = {label: name for label, name in parts.items() if hasattr(losses[0], name)}
    panels = 2 if parts else 1
    figure = Figure(figsize=(9 if parts else 6, 3.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    # −ELBO falls from tens of nats to a few, so it needs a logarithmic axis, which has no zero;
    # the marginal KL ends near zero, so it needs a linear one.
    plot_running_means(left, losses, names, ("C0", "C1", "C2"), LEAST)
    left.set(yscale="log", xlabel="epoch", ylabel="nats per image")
    left.yaxis.set_major_formatter("{x:g}")
    if mean_image is not None:
        label = f"mean image {mean_image:.2f}"
        left.axhline(max(mean_image, LEAST), color="black", linestyle=":", label=label)
    for axes in right:
        top = plot_running_means(axes, losses, parts, ("C4", "C3"), 0)
        axes.set(xlabel="epoch", ylabel="nats per image")
        if n is not None:
            most = math.log(n)
            axes.axhline(most, color="black", linestyle=":", label=f"ln {n} = {most:.2f}")
            top = max(top, most)
        axes.set_ylim(0, 1.1 * max(top, 0.1))
    for axes in (left, *right):
        # Two columns in either panel, so that both legends are as high and the panels level
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure


def plot_running_means(axes, losses, names, colours, least):
    """Plot some of the losses, {label: field}, nothing below `least`. The highest running mean."""
    epochs = np.arange(1, len(losses) + 1)
    windows = np.maximum(1, epochs // 50)
    marker = "." if len(losses) == 1 else ""  # a single point makes no line
    highest = 0
    for (label, name), colour in zip(names.items(), colours, strict=False):
        values = np.array([float(getattr(each, name)) for each in losses])
        sums = np.concatenate([[0], values.cumsum()])
        means = (sums[epochs] - sums[epochs - windows]) / windows
        axes.plot(epochs, values.clip(least), color=colour, alpha=0.25, linewidth=0.5)
        strong = {"color": colour, "marker": marker, "zorder": 3}
        axes.plot(epochs, means.clip(least), label=f"{label} {means[-1]:.2f}", **strong)
        highest = max(highest, means.max())
    return highest


@default_settings()
def to_png(figure):
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def show(figure, alt, handle=None):
    """Display a figure with the text alternative `alt`, in place of what the display handle shows
    if one is given."""
    picture = Image(to_png(figure), alt=alt)
    if handle is None:
        display(picture)
    else:
        handle.update(picture)


def show_rows(rows, alt, width=6.0):
    """Display rows of images, {label: (N, 1, H, W)}, with the text alternative `alt`."""
    images = torch.cat(list(rows.values()))
    columns = len(images) // len(rows)
    show(image_grid(images, columns, list(rows), width), alt)


def live(training, epochs, film, mean_image=None):
    """Pass on the losses of `training`, an iterator of so many `epochs`, and meanwhile record the
    `film`, and draw the losses below the cell, with the −ELBO of the mean image in nats if it is
    given. The stop button ends the loop without an error."""
    handle = display("No epoch is finished yet.", display_id=True)
    history = []

    def draw():
        title = f"epoch {len(history)} of {epochs}"
        alt = f"Line charts over {len(history)} epochs, nats per image: −ELBO and its parts"
        show(plot_losses(history, mean_image, len(film.images), title), alt, handle)

    drawn = -math.inf  # when, in seconds
    try:
        for losses in training:
            history.append(losses)
            yield losses  # before anything is drawn, so that no stop can lose it
            film.record(losses)
            if time.monotonic() - drawn > 5:  # a drawing takes the time of twenty steps
                draw()
                drawn = time.monotonic()
    except KeyboardInterrupt:
        print("Stopped by hand: the model stays as trained so far.")
    if history:
        film.end(history)
        draw()


class Film:
    """The training of `vae` on `images` for so many `epochs` as a film: about 24 moments, the early
    ones close together, of what it draws, and of the posteriors.

    It draws 25 points along the first dimension of the prior where `vae` has the means for that,
    a `latent.line` and a `decoder`; else 25 samples, always of the same seed.
    """

    def __init__(self, vae, images, epochs):
        self.vae = vae
        self.images = images
        shares = np.linspace(0, 1, FRAMES) ** 3  # of the epochs
        self.chosen = set((epochs * shares).round().clip(1).astype(int))
        self.epoch = 0
        self.moments = []

    def record(self, losses):
        """Call this after each epoch; `losses` are the epoch's."""
        self.epoch += 1
        if self.epoch in self.chosen:
            self.add(losses)

    def end(self, history):
        """Call this when the training has ended, early or not, with the losses of all epochs."""
        self.epoch = len(history)
        if not self.moments or self.moments[-1].epoch != self.epoch:
            self.add(history[-1])

    def add(self, losses):
        """One more moment of the film."""
        mode = self.vae.training
        self.vae.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # the training is not disturbed
            if hasattr(self.vae, "decoder") and hasattr(getattr(self.vae, "latent", None), "line"):
                decoded = self.vae.decoder(self.vae.latent.line(25))  # (25, 1, 32, 32)
            else:
                decoded = self.vae.sample(25, seed=0)  # (25, 1, 32, 32)
            _, mu, logvar = self.vae(self.images)  # (N, L) each
        self.vae.train(mode)
        self.moments.append(Moment(self.epoch, losses, decoded, mu, logvar))

    def show(self):
        """Display the film with a slider that needs no kernel."""
        if not self.moments:
            print("There is no film: no epoch was finished.")
            return
        order = self.moments[-1].mu[:, 0].argsort()  # of the images, by their last place
        frames = [film_frame(moment, order) for moment in self.moments]
        few = [frames[0], frames[len(frames) // 2], frames[-1]]
        slider_picture(
            "film",
            frames,
            len(frames) - 1,
            still=np.concatenate(few),
            label="moment of training",
            alt=f"Epochs 1 to {self.moments[-1].epoch}: left, decoded points of the prior; "
            "right, where the posterior of each image lies",
        )

    def show_posteriors(self):
        """Display every image's posterior, their average and the prior at up to three moments:
        the first, the one nearest to a twentieth of the epochs, and the last. The losses have to
        tell the two parts of KL."""
        if not self.moments:
            print("There are no posteriors to show: no epoch was finished.")
            return
        first, last = self.moments[0], self.moments[-1]
        between = min(self.moments, key=lambda moment: abs(moment.epoch - last.epoch / 20))
        chosen = {moment.epoch: moment for moment in (first, between, last)}  # each once
        alt = (
            "Curves over z: the posteriors of all images as small bells, their sum, and the prior, "
            f"at epochs {', '.join(map(str, chosen))}"
        )
        show(plot_posteriors(chosen.values()), alt)


@default_settings()
def film_frame(moment, order):
    """One moment of the film, (H, W, 3) bytes: left the decoded points; right a row for each image,
    in this order, with a bar where its posterior lies."""
    columns = math.ceil(math.sqrt(len(moment.decoded)))
    grid = make_grid(moment.decoded, columns, pad_value=1)[0]
    height, width = 2 * grid.shape[0], 2 * grid.shape[1]  # whole pixels, which make small files
    size = np.array([width + 346, height + 80])  # of the frame, in pixels
    figure = Figure(figsize=size / 100, dpi=100)
    left = figure.add_axes([10 / size[0], 48 / size[1], width / size[0], height / size[1]])
    right = figure.add_axes([1 - 316 / size[0], 48 / size[1], 300 / size[0], height / size[1]])
    left.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    left.set(title=f"epoch {moment.epoch}: −ELBO {moment.losses.loss:.1f}", xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    low, high = bars(moment.mu[order], moment.logvar[order])  # (N,) each
    n = len(order)
    points_high = 0.72 * height  # of the axes
    right.hlines(range(n), low, high, color="#0072B2", linewidth=0.8 * points_high / n)
    right.set(title="posterior of each image, μ ± 2σ", xlim=(0, 1), yticks=[])
    right.set(ylim=(n - 0.5, -0.5), xlabel="share of the prior below $z$", ylabel="images")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def bars(mu, logvar):
    """Where posteriors (N, L) lie in the first latent dimension: from mu − 2 sigma to mu + 2 sigma,
    (N,) each, as the shares of the prior that are below."""
    sigma = torch.exp(0.5 * logvar[:, 0])  # (N,)
    low = torch.special.ndtr(mu[:, 0] - 2 * sigma)  # the standard normal distribution function
    high = torch.special.ndtr(mu[:, 0] + 2 * sigma)
    return low, high


@default_settings()
def plot_posteriors(moments):
    """A figure with a panel for each moment: the posterior density of each image i as a share of
    all, qᵢ(z)/n, their sum q(z), and the prior's density, over the first latent dimension.

    Posteriors that lie side by side tell images apart, which takes ln n nats of information; where
    they crowd, their sum lies above the prior, which costs marginal KL.
    """
    moments = list(moments)
    n = len(moments[-1].mu)
    figure = Figure(figsize=(9, 1.6 * len(moments) + 0.8), layout="constrained")
    panels = figure.subplots(len(moments), sharex=True, sharey=True, squeeze=False)[:, 0]
    ranks = moments[-1].mu[:, 0].argsort().argsort().numpy()  # (N,), places in the last order
    colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, n)[ranks])  # (N, 4)
    evenly = np.linspace(-3.2, 3.2, 641)  # (641,), over nearly all of the prior
    prior = np.exp(-0.5 * evenly**2) / math.sqrt(2 * math.pi)  # (641,)
    for axes, moment in zip(panels, moments, strict=True):
        mu = moment.mu[:, :1].double().numpy()  # (N, 1)
        sigma = np.exp(0.5 * moment.logvar[:, :1].double().numpy())  # (N, 1)
        # Late posteriors are a hundred times as narrow as the prior: each has points of its own.
        steps = np.linspace(-4, 4, 65)
        z = mu + sigma * steps  # (N, 65)
        shares = np.exp(-0.5 * steps**2) / (n * sigma * math.sqrt(2 * math.pi))  # (N, 65)
        bells = PolyCollection(np.stack([z, shares], axis=2), facecolors=colours, alpha=0.75)
        axes.add_collection(bells)
        places = np.sort(np.concatenate([evenly, z[:, ::4].ravel()]))  # (M,)
        densities = np.exp(-0.5 * ((places - mu) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        axes.fill_between(places, densities.mean(0), color="0.85", zorder=0)  # behind the bells
        axes.plot(evenly, prior, color="black")
        information, marginal = moment.losses.information, moment.losses.marginal_kl
        title = f"epoch {moment.epoch}: information {information:.2f}, marginal KL {marginal:.2f}"
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set(yticks=[], ylabel="density")
    top = min(panels[0].get_ylim()[1], 2.0)  # a crowd at the start must not dwarf all else
    panels[0].set(xlim=evenly[[0, -1]], ylim=(0, top))
    panels[-1].set_xlabel("$z$" if moments[-1].mu.shape[1] == 1 else "$z_1$")
    handles = [panels[0].lines[0], *panels[0].collections[::-1]]
    names = ["prior $p(z)$", "$q(z)$, sum of all", "$q_i(z)/N$, posterior of an image"]
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return figure


def flip_book(images, label):
    """Display one of the images (N, 1, H, W) at a time, chosen by a slider that needs no kernel;
    `label` stands beside the slider."""
    frames = [np.asarray(frame) for frame in (255 * images[:, 0]).round().byte().numpy()]
    alt = "The image that the slider chooses"
    start = len(frames) // 2
    still = np.kron(frames[start], np.ones((8, 8), np.uint8))  # eight times as large
    slider_picture("line", frames, start, still=still, label=label, alt=alt, width=256)


# The slider moves a sheet of all frames behind a window of one. JupyterLab strips scripts from a
# notebook that it does not trust, and so do some sites: the still picture and the sentence stay.
SLIDER = """<div><div id="{name}" role="img" aria-label="{alt}" style="max-width:{width}px;
aspect-ratio:{wide}/{high}; image-rendering:{rendering};
background:url(data:image/png;base64,{sheet}) 0 {place}%/100%">
<img src="data:image/png;base64,{still}" alt="{alt}" width="{width}"
onload="const [picture, slider, hint] = this.parentNode.parentNode.children;
slider.hidden = false; hint.remove(); picture.replaceChildren()"></div>
<label hidden="hidden">{label} <input type="range" min="0" max="{last}" value="{start}"
style="width:20em" data-lm-suppress-shortcuts="true"
oninput="this.parentNode.previousElementSibling.style.backgroundPositionY =
`${{100 * this.value / this.max}}%`"></label>
<p>A still picture. Run the notebook to get a slider: {label}.</p></div>"""


def slider_picture(name, frames, start, *, still, label, alt, width=None):
    """Display one of the frames, (H, W) or (H, W, 3) bytes each, by a slider without a kernel that
    stands at `start` at first, and the picture `still` where scripts are not run."""
    high, wide = frames[0].shape[:2]
    still = small_png(still)
    page = SLIDER.format(
        name=name,
        alt=html.escape(alt),
        label=html.escape(label),
        start=start,
        last=len(frames) - 1,
        place=100 * start / max(1, len(frames) - 1),
        wide=wide,
        high=high,
        width=width or wide,
        rendering="pixelated" if width else "auto",
        sheet=base64.b64encode(small_png(np.concatenate(frames))).decode(),
        still=base64.b64encode(still).decode(),
    )
    bundle = {"text/html": page, "image/png": still, "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def small_png(pixels):
    """A PNG file's bytes, with 32 colours."""
    buffer = io.BytesIO()
    image = PIL.Image.fromarray(pixels).quantize(32, PIL.Image.Quantize.FASTOCTREE)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def explorer(decode, start):
    """Display a slider for each latent dimension, at `start` (L,) at first, and the image that
    `decode` makes of z (1, L); where nobody could move a slider, print a sentence instead."""
    if takes_input():
        display(explorer_widget(decode, start))
    else:
        print("Run in JupyterLab, this cell shows a slider that decodes any z.")


def takes_input():
    """Whether somebody sits before this kernel: JupyterLab, VS Code and Colab offer to answer
    `input()`, runs by nbconvert do not."""
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    request = kernel.get_parent("shell").get("content", {})
    return request.get("allow_stdin", False)


def explorer_widget(decode, start):
    """A slider for each latent dimension beside the decoded image, (1, 1, H, W) = decode(z)."""
    canvas = widgets.Image(format="png", width=256)
    sliders = [
        widgets.FloatSlider(value, description=f"z {number}", min=-3, max=3, step=0.01)
        for number, value in enumerate(start.tolist(), 1)
    ]

    @torch.no_grad()
    def update(change=None):
        z = start.new_tensor([[slider.value for slider in sliders]])  # (1, L)
        pixels = (255 * decode(z)[0, 0]).round().byte().numpy()
        picture = PIL.Image.fromarray(pixels).resize((256, 256), PIL.Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        canvas.value = buffer.getvalue()

    for slider in sliders:
        slider.observe(update, "value")
    update()
    return widgets.HBox([canvas, widgets.VBox(sliders)])


def show_source(*parts):
    """Display the source of functions, methods and classes as highlighted Python, each below the
    file and the line where it stands."""
    display(Markdown("\n\n".join(listing(part) for part in parts)))


def listing(part):
    """The source of one function, method or class as Markdown."""
    path = Path(inspect.getsourcefile(part))
    if path.stat().st_mtime > STARTED:
        return f"`{path.name}` has changed, but this kernel still runs the old version: restart it"
    lines, first = inspect.getsourcelines(part)
    source = "".join(lines)
    owner = part.__qualname__.rpartition(".")[0]
    if owner:  # a method, which says little without its class
        head = inspect.getsource(getattr(inspect.getmodule(part), owner)).splitlines()[0]
        source = f"{head}\n    ...\n\n{source}"
    return f"`{path.name}`, line {first}\n\n```python\n{source}```"


def save_grid(images, path):
    """Write a PNG picture of images (N, 1, H, W), ten in a row, each three times as large."""
    large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)  # (N, 1, 3H, 3W)
    save_image(make_grid(large, nrow=10, padding=6, pad_value=1), path)
