"""The pictures of the notebook: image grid, losses, film of training, flip book, explorer.

Images are tensors (N, 1, 32, 32) with pixels in [0, 1]; losses are named tuples
`(loss, reconstruction, kl)`, one an epoch, in nats per image.
"""

import base64
import html
import inspect
import io
import math
import os
import textwrap
import time
from collections import namedtuple

import ipywidgets as widgets
import numpy as np
import PIL.Image
import torch
from IPython import get_ipython
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from torchvision.utils import make_grid, save_image

LEAST = 1e-3  # nats, at the foot of the losses' logarithmic axis, which has no zero
FRAMES = 24  # of the film

Moment = namedtuple("Moment", "epoch loss decoded mu logvar")


def image_grid(images, columns=10, rows=(), width=6.0):
    """A figure, `width` inches wide, of images (N, 1, H, W) in a grid, with a label beside each row
    if `rows` gives them."""
    grid = make_grid(images, nrow=columns, pad_value=1)[0]  # (H, W) of the whole grid
    height = width * len(grid) / len(grid[0])
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    pitch = images.shape[2] + 2  # an image's height and the white border
    axes.set_yticks([pitch * (row + 0.5) for row in range(len(rows))], rows)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def plot_losses(losses, mean_image=None, title=""):
    """A figure of −ELBO, reconstruction and KL per epoch, each with its mean over the last 2 % of
    epochs; a horizontal line shows the −ELBO of the mean image, if `mean_image` gives it in nats:
    a model that ends above it has learnt nothing."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(yscale="log", xlabel="epoch", ylabel="nats per image", title=title)
    epochs = range(1, len(losses) + 1)
    marker = "." if len(losses) == 1 else ""  # a single point makes no line
    for name, values in zip(("−ELBO", "reconstruction", "KL"), np.array(losses).T, strict=True):
        means = np.array([values[epoch - max(1, epoch // 50) : epoch].mean() for epoch in epochs])
        label = f"{name} {means[-1]:.2f}"
        (line,) = axes.plot(epochs, means.clip(LEAST), label=label, marker=marker, zorder=3)
        axes.plot(epochs, values.clip(LEAST), color=line.get_color(), alpha=0.25, linewidth=0.5)
    if mean_image is not None:
        label = f"mean image {mean_image:.2f}"
        axes.axhline(max(mean_image, LEAST), color="black", linestyle=":", label=label)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


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


class LiveLosses:
    """The losses of a training run of so many `epochs`, drawn below the cell while it runs."""

    def __init__(self, epochs, mean_image=None):
        self.epochs = epochs
        self.mean_image = mean_image
        self.drawn = -math.inf  # when, in seconds
        self.handle = display("No epoch is finished yet.", display_id=True)

    def update(self, history):
        """Draw the losses so far if two seconds have passed, or if training is complete."""
        if time.monotonic() - self.drawn > 2 or len(history) == self.epochs:
            self.draw(history)

    def draw(self, history):
        """Draw the losses so far."""
        if history:
            title = f"epoch {len(history)} of {self.epochs}"
            alt = "Line chart: −ELBO, reconstruction and KL in nats per image over the epochs"
            show(plot_losses(history, self.mean_image, title), alt, self.handle)
            self.drawn = time.monotonic()


def live(training, epochs, film, mean_image=None):
    """Pass on the losses of `training`, an iterator of so many `epochs`, and meanwhile draw them
    below the cell and record the `film`. The stop button ends the loop without an error."""
    chart = LiveLosses(epochs, mean_image)
    history = []
    try:
        for losses in training:
            history.append(losses)
            chart.update(history)
            film.record(losses)
            yield losses
    except KeyboardInterrupt:
        print("Stopped by hand: the model stays as trained so far.")
    chart.draw(history)


class Film:
    """The training of `vae` on `images` for so many `epochs` as a film: about 24 moments, the early
    ones close together, of what it makes of 25 draws from the prior, and of the posteriors."""

    def __init__(self, vae, images, epochs):
        self.vae = vae
        self.images = images
        self.points = vae.latent.sample(25).sort(0).values  # (25, D)
        shares = np.linspace(0, 1, FRAMES) ** 3  # of the epochs
        self.chosen = set((epochs * shares).round().clip(1).astype(int))
        self.epoch = 0
        self.moments = []

    @torch.no_grad()
    def record(self, losses):
        """Call this after each epoch; `losses` are the epoch's."""
        self.epoch += 1
        if self.epoch in self.chosen:
            decoded = self.vae.decoder(self.points).cpu()  # (25, 1, 32, 32)
            mu, logvar = self.vae.encoder(self.images)  # (N, D) each
            moment = Moment(self.epoch, losses.loss, decoded, mu.cpu(), logvar.cpu())
            self.moments.append(moment)

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
            still=np.concatenate(few),
            label="moment of training",
            alt="Left, decoded points of the prior; right, where the posterior of each image lies",
        )


def film_frame(moment, order):
    """One moment of the film, (H, W, 3) bytes: left the decoded points; right a row for each image,
    in this order, with a bar from mu − 2 sigma to mu + 2 sigma, as shares of the prior."""
    columns = math.ceil(math.sqrt(len(moment.decoded)))
    grid = make_grid(moment.decoded, columns, pad_value=1)[0]
    height, width = 2 * grid.shape[0], 2 * grid.shape[1]  # whole pixels, which make small files
    size = np.array([width + 340, height + 80])  # of the frame, in pixels
    figure = Figure(figsize=size / 100, dpi=100)
    left = figure.add_axes([10 / size[0], 48 / size[1], width / size[0], height / size[1]])
    right = figure.add_axes([1 - 310 / size[0], 48 / size[1], 300 / size[0], height / size[1]])
    left.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    left.set(title=f"epoch {moment.epoch}: −ELBO {moment.loss:.1f}", xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    mu = moment.mu[order, 0]  # (N,), the first latent dimension
    sigma = torch.exp(0.5 * moment.logvar[order, 0])  # (N,)
    low = torch.special.ndtr(mu - 2 * sigma)  # the standard normal distribution function
    high = torch.special.ndtr(mu + 2 * sigma)
    n = len(order)
    points_high = 0.72 * height  # of the axes
    right.hlines(range(n), low, high, color="#0072B2", linewidth=0.8 * points_high / n)
    right.set(title="posterior of each image, μ ± 2σ", xlim=(0, 1), yticks=[])
    right.set(ylim=(n - 0.5, -0.5), xlabel="share of the prior below $z$", ylabel="images")
    picture = PIL.Image.open(io.BytesIO(to_png(figure)))
    return np.asarray(picture.convert("RGB"))


def flip_book(images, label):
    """Display one of the images (N, 1, H, W) at a time, chosen by a slider that needs no kernel;
    `label` stands beside the slider."""
    frames = [np.asarray(frame) for frame in (255 * images[:, 0]).round().byte().cpu().numpy()]
    alt = "The image that the slider chooses"
    still = np.kron(frames[-1], np.ones((8, 8), np.uint8))  # eight times as large
    slider_picture("line", frames, still=still, label=label, alt=alt, width=256)


# The slider moves a sheet of all frames behind a window of one. JupyterLab strips scripts from a
# notebook that it does not trust, and so do some sites: the still picture and the sentence stay.
SLIDER = """<div><div id="{name}" role="img" aria-label="{alt}" style="max-width:{width}px;
aspect-ratio:{wide}/{high}; image-rendering:{rendering};
background:url(data:image/png;base64,{sheet}) 0 100%/100%">
<img src="data:image/png;base64,{still}" alt="{alt}" width="{width}"
onload="const [picture, slider, hint] = this.parentNode.parentNode.children;
slider.hidden = false; hint.remove(); picture.replaceChildren()"></div>
<label hidden="hidden">{label} <input type="range" min="0" max="{last}" value="{last}"
style="width:20em" data-lm-suppress-shortcuts="true"
oninput="this.parentNode.previousElementSibling.style.backgroundPositionY =
`${{100 * this.value / this.max}}%`"></label>
<p>A still picture: run this cell to get a slider, {label}.</p></div>"""


def slider_picture(name, frames, *, still, label, alt, width=None):
    """Display one of the frames, (H, W) or (H, W, 3) bytes each, by a slider without a kernel, and
    the picture `still` where scripts are not run."""
    high, wide = frames[0].shape[:2]
    still = small_png(still)
    page = SLIDER.format(
        name=name,
        alt=html.escape(alt),
        label=html.escape(label),
        last=len(frames) - 1,
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


def explorer(decode, latent_dim):
    """Display a slider for each latent dimension and the image that `decode` makes of z (1, D);
    where nobody could move a slider, print a sentence instead."""
    if takes_input():
        display(explorer_widget(decode, latent_dim))
    else:
        print("In JupyterLab, this cell shows a slider that decodes any z.")


def takes_input():
    """Whether somebody sits before this kernel: JupyterLab, VS Code and Colab offer to answer
    `input()`, runs by nbconvert do not."""
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    request = kernel.get_parent("shell").get("content", {})
    return request.get("allow_stdin", False)


def explorer_widget(decode, latent_dim):
    """A slider for each latent dimension beside the decoded image, (1, 1, H, W) = decode(z)."""
    canvas = widgets.Image(format="png", width=256)
    sliders = [
        widgets.FloatSlider(description=f"z {dimension + 1}", min=-3, max=3, step=0.01)
        for dimension in range(latent_dim)
    ]

    @torch.no_grad()
    def update(change=None):
        z = torch.tensor([[slider.value for slider in sliders]])  # (1, D)
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
    """Display the source of functions and classes as highlighted Python."""
    sources = [textwrap.dedent(inspect.getsource(part)) for part in parts]
    display(Markdown("```python\n" + "\n".join(sources) + "```"))


def save_grid(images, path):
    """Write a PNG picture of images (N, 1, H, W), ten in a row, each three times as large."""
    large = images.repeat_interleave(3, 2).repeat_interleave(3, 3)  # (N, 1, 3H, 3W)
    part = f"{path}.part"
    save_image(make_grid(large, nrow=10, padding=6, pad_value=1), part, "png")
    os.replace(part, path)
