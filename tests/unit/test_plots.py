"""Tests of plots.py: what its figures, films, sliders and listings show."""

import base64
import inspect
import io
import re
import unittest
import warnings
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import torch
from PIL import Image

import plots
import vae_lib
from vae_lib import Losses

USER_SETTINGS = {
    "image.origin": "lower",
    "savefig.bbox": "tight",
    "savefig.dpi": 60,
    "font.size": 30,
    "lines.linewidth": 9,
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class StandIn(torch.nn.Module):
    """In place of a VAE of n images: it does not learn, and its decoder shows z[0] as a grey."""

    def __init__(self, n=3, dim=1):
        super().__init__()
        self.mu = torch.linspace(-1, 1, n).unsqueeze(1).expand(n, dim)
        self.latent = vae_lib.Latent(dim)

    def decoder(self, z):
        return z[:, :1, None, None].expand(-1, 1, 32, 32).clamp(0, 1)

    def forward(self, images):
        noise = torch.randn(self.mu.shape)  # by the global generator, as a student's may
        return self.decoder(self.mu + noise), self.mu, torch.full_like(self.mu, -4.0)

    def sample(self, n, seed=0):
        return self.decoder(self.latent.sample(n, "iid", seed))


def losses_of(epoch):
    return Losses(30.0 - epoch, 20.0, 10.0 - epoch, 9.0 - epoch, 1.0)


def film_of(epochs, n=3, dim=1):
    """A film of so many epochs of a stand-in."""
    film = plots.Film(StandIn(n, dim), torch.zeros(n, 1, 32, 32), epochs)
    for epoch in range(1, epochs + 1):
        film.record(losses_of(epoch))
    return film


def displayed(function, *arguments):
    """The data and the metadata of what the function displays."""
    with mock.patch.object(plots, "display") as display:
        function(*arguments)
    shown = display.call_args.args[0]
    if isinstance(shown, dict):
        return shown, display.call_args.kwargs["metadata"]
    return shown._repr_mimebundle_()


def frames_of(page):
    """The frames of the sheet in a slider's page, (frames, H, W, 3) bytes."""
    png = base64.b64decode(re.search("url\\(data:image/png;base64,([^)]+)", page)[1])
    last = int(re.search('max="(\\d+)"', page)[1])
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return np.stack(np.split(sheet, last + 1))


class FigureTest(unittest.TestCase):
    def test_image_grid(self):
        images = 3 * torch.rand(7, 1, 32, 32, generator=seeded(0))  # over 1, as differences may be
        figure = plots.image_grid(images, columns=4, rows=["one", "two"], width=5)
        axes = figure.axes[0]
        grid = torch.tensor(np.array(axes.images[0].get_array()))  # with a border of 2 pixels
        for i, image in enumerate(images):
            top, left = 2 + i // 4 * 34, 2 + i % 4 * 34
            self.assertTrue(torch.equal(grid[top : top + 32, left : left + 32], image[0]))
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], ["one", "two"])
        np.testing.assert_allclose(axes.get_yticks(), [17.5, 51.5], atol=1)  # beside their middles
        shades = axes.images[0].to_rgba(np.array([0, 0.2, 1]))[:, 0]
        np.testing.assert_allclose(shades, [0, 0.2, 1])  # black to white
        rows = {"one": images[:4], "two": images[3:]}
        shown, _ = displayed(plots.show_rows, rows, "two rows", 5)
        expected = plots.to_png(plots.image_grid(torch.cat(list(rows.values())), 4, list(rows), 5))
        self.assertTrue(base64.b64decode(shown["image/png"]) == expected)

    def test_diagram_has_x_on_the_left_and_its_reconstruction_on_the_right(self):
        x, x_hat = torch.rand(2, 1, 32, 32, generator=seeded(0))
        axes, *pictures = plots.diagram(x, x_hat).axes
        places = {text.get_text(): text.get_position()[0] for text in axes.texts}
        self.assertLess(places["encoder"], places["decoder"])
        pictures.sort(key=lambda axes: axes.get_position().x0)
        for axes, image in zip(pictures, (x, x_hat), strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), image[0])

    def test_losses_and_their_means(self):
        losses = [Losses(30.0, 20.0, 10.0, 8.0, 2.0)] * 99 + [Losses(9.0, 5.0, 4.0, 3.0, 1.0)]
        figure = plots.plot_losses(losses, mean_image=25.5, n=100)
        labels, ends, means = [], [], []
        for axes in figure.axes:
            labels += [text.get_text() for text in axes.get_legend().get_texts()]
            lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 100]
            ends += [line[-1] for line in lines[::2]]
            means += [line[-1] for line in lines[1::2]]
        self.assertEqual(ends, [9, 5, 4, 3, 1])
        np.testing.assert_allclose(means, [19.5, 12.5, 7, 5.5, 1.5])  # of two epochs
        left = ["−ELBO 19.50", "reconstruction 12.50", "KL 7.00", "mean image 25.50"]
        self.assertEqual(labels, [*left, "information 5.50", "marginal KL 1.50", "ln 100 = 4.61"])

    def test_losses_of_another_model(self):
        """With fewer parts, and tensors in place of numbers."""
        losses = [SimpleNamespace(loss=torch.tensor(3.0), kl=torch.tensor(1.0))] * 2
        (axes,) = plots.plot_losses(losses, mean_image=25.5, n=100).axes
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        self.assertEqual(labels, ["−ELBO 3.00", "KL 1.00", "mean image 25.50"])

    def test_losses_of_one_epoch_and_of_zero_are_seen(self):
        for loss in (Losses(25.0, 25.0, 0.0, 0.1, -0.1), Losses(0.0, 0.0, 0.0, 0.0, 0.0)):
            figure = plots.plot_losses([loss], mean_image=0.0, n=2)
            with warnings.catch_warnings(action="error", category=UserWarning):
                plots.to_png(figure)
            for axes in figure.axes:
                low, high = axes.get_ylim()
                for line in axes.lines[1:-1:2]:
                    self.assertTrue(low <= line.get_ydata()[0] < high, loss)
                    self.assertNotIn(line.get_marker(), ("", "None"))

    def test_the_stop_button(self):
        """Wherever it lands, losses, picture and film end with the same epoch."""
        for where in ("training", "drawing", "recording"):
            film = film_of(0)
            film.chosen = {1, 2, 3, 50}
            stopped = False

            def stop(place, epoch, film=film, where=where):
                nonlocal stopped
                if (place, epoch, stopped) == (where, 5, False):
                    stopped = True
                    raise KeyboardInterrupt

            def training(stop=stop):
                for epoch in range(1, 51):
                    yield losses_of(epoch)
                    stop("training", epoch)

            def draw(losses, *arguments, original=plots.plot_losses, stop=stop):
                self.assertEqual(arguments, (25.5, 3, f"epoch {len(losses)} of 50"))  # 3 images
                stop("drawing", len(losses))
                return original(losses, *arguments)

            def record(losses, original=film.record, film=film, stop=stop):
                stop("recording", film.epoch + 1)
                original(losses)

            film.record = record
            with (
                self.subTest(where),
                mock.patch.object(plots, "display") as display,
                mock.patch.object(plots, "plot_losses", draw),
                mock.patch("builtins.print") as printed,
                mock.patch("time.monotonic", side_effect=range(0, 10_000, 3)),
            ):
                found = list(plots.live(training(), 50, film, 25.5))
                self.assertEqual(len(found), 5)
                self.assertEqual(film.moments[-1].epoch, 5)
                self.assertEqual(film.moments[-1].losses, found[-1])
                self.assertIn("Stopped by hand", printed.call_args.args[0])
                display.assert_called_once()  # so that a single picture stays
                pictures = [call.args[0] for call in display.return_value.update.call_args_list]
                self.assertTrue(1 < len(pictures) < 5)
                alt = pictures[-1]._repr_mimebundle_()[1]["image/png"]["alt"]
                self.assertIn("over 5 epochs", alt)

    def test_users_settings_change_nothing(self):
        images = torch.rand(7, 1, 32, 32, generator=seeded(0))
        film = film_of(3)

        def pictures():
            figures = [
                plots.image_grid(images),
                plots.diagram(images[0], images[1]),
                plots.plot_losses([moment.losses for moment in film.moments], 25.5, 3),
                plots.plot_posteriors(film.moments[:1]),
            ]
            frames = displayed(film.show)[0]["image/png"]
            return [*(plots.to_png(figure) for figure in figures), frames]

        expected = pictures()
        with matplotlib.rc_context(USER_SETTINGS):
            self.assertTrue(all(map(bytes.__eq__, pictures(), expected)))
            self.assertEqual(matplotlib.rcParams["font.size"], 30)  # and they stay


class FilmTest(unittest.TestCase):
    def test_moments(self):
        for epochs in (1, 2, 47, 5000):
            film = film_of(epochs)
            film.end([losses_of(epoch) for epoch in range(1, epochs + 1)])
            chosen = [moment.epoch for moment in film.moments]
            self.assertEqual([chosen[0], chosen[-1]], [1, epochs])
            self.assertEqual(chosen, sorted(set(chosen)))
            self.assertLessEqual(len(chosen), 24)
            self.assertEqual(
                [moment.losses.loss for moment in film.moments], [30 - e for e in chosen]
            )
        self.assertGreater(len(chosen), 20)  # of 5000
        self.assertLess(chosen[len(chosen) // 2], 1250)  # early ones are close together

    def test_it_shows_the_line_or_samples(self):
        film = film_of(1, dim=2)
        expected = film.vae.decoder(film.vae.latent.line(25))
        self.assertTrue(torch.equal(film.moments[0].decoded, expected))
        other = StandIn()
        other.latent = None
        film = plots.Film(other, torch.zeros(3, 1, 32, 32), 1)
        other.sample = lambda n, seed: torch.full((n, 1, 32, 32), 0.25)
        film.record(losses_of(1))
        self.assertTrue((film.moments[0].decoded == 0.25).all())

    def test_the_training_is_not_disturbed(self):
        """The model is looked at in evaluation mode, and trains on with the same random numbers."""
        film = film_of(0)
        modes = []
        film.vae.register_forward_hook(lambda vae, *_: modes.append(vae.training))
        before = torch.get_rng_state()
        film.record(losses_of(1))
        self.assertEqual((modes, film.vae.training), ([False], True))
        self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_rows_follow_the_order_with_their_widths(self):
        moment = film_of(1).moments[0]._replace(logvar=torch.tensor([[0.0], [-2.0], [-4.0]]))
        order = torch.tensor([2, 0, 1])
        in_order = moment._replace(mu=moment.mu[order], logvar=moment.logvar[order])
        expected = plots.film_frame(in_order, torch.arange(3))
        self.assertTrue(np.array_equal(plots.film_frame(moment, order), expected))
        self.assertFalse(np.array_equal(plots.film_frame(moment, torch.arange(3)), expected))

    def test_any_number_of_images_and_dimensions(self):
        for n, dim, epochs in ((2, 1, 1), (300, 1, 2), (7, 2, 5)):
            film = film_of(epochs, n, dim)
            data, metadata = displayed(film.show)
            frames = frames_of(data["text/html"])
            self.assertEqual(len(frames), epochs)
            self.assertGreater(len(metadata["image/png"]["alt"]), 20)
            with Image.open(io.BytesIO(data["image/png"])) as still:
                self.assertEqual(still.size, (frames.shape[2], 3 * frames.shape[1]))
            _, metadata = displayed(film.show_posteriors)
            self.assertGreater(len(metadata["image/png"]["alt"]), 20)

    def test_no_epoch_says_so(self):
        for show in (film_of(0).show, film_of(0).show_posteriors):
            with mock.patch("builtins.print") as printed:
                show()
            self.assertIn("no epoch was finished", printed.call_args.args[0])
        with mock.patch.object(plots, "display"):
            self.assertEqual(list(plots.live(iter(()), 5, film_of(0))), [])

    def test_bars_are_four_sigma_of_the_prior(self):
        mu = torch.tensor([[0.0, 9.0], [0.6745, 9.0]])  # the middle and the third quarter
        low, high = plots.bars(mu, torch.tensor([[0.0, 9.0], [-20.0, 9.0]]))
        np.testing.assert_allclose(low, [0.02275, 0.75], atol=1e-4)
        np.testing.assert_allclose(high, [0.97725, 0.75], atol=1e-4)

    def test_film_shows_images_in_their_last_order(self):
        film = film_of(2)
        film.moments[-1] = film.moments[-1]._replace(mu=torch.tensor([[0.5], [0.9], [0.1]]))
        frame = np.zeros((8, 8, 3), np.uint8)
        with mock.patch.object(plots, "film_frame", return_value=frame) as film_frame:
            displayed(film.show)
        self.assertEqual([call.args[1].tolist() for call in film_frame.mock_calls], [[2, 0, 1]] * 2)

    def test_posteriors_early_between_and_late(self):
        film = film_of(1000)
        with mock.patch.object(plots, "show") as show:
            film.show_posteriors()
        axes = show.call_args.args[0].axes
        epochs = [int(re.search("epoch (\\d+)", panel.get_title("left"))[1]) for panel in axes]
        self.assertEqual([epochs[0], epochs[2]], [1, 1000])
        self.assertTrue(35 < epochs[1] < 65, epochs)
        bells, total = axes[0].collections
        for path, mu in zip(bells.get_paths(), (-1, 0, 1), strict=True):
            z, share = path.vertices[:-1].T
            self.assertAlmostEqual(np.trapezoid(share, z), 1 / 3, delta=1e-3)
            self.assertAlmostEqual(z[share.argmax()], mu)
        around = total.get_paths()[0].vertices.T
        self.assertAlmostEqual(np.trapezoid(*around[::-1]), 1, delta=1e-3)
        legend = show.call_args.args[0].legends[0].legend_handles
        np.testing.assert_array_equal(legend[1].get_facecolor(), total.get_facecolor()[0])
        self.assertEqual(axes[0].get_title("left"), "epoch 1: information 8.00, marginal KL 1.00")
        z, prior = axes[0].lines[0].get_data()
        np.testing.assert_allclose(prior, np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi))

    def test_colours_run_along_the_line(self):
        moment = film_of(1).moments[0]._replace(mu=torch.tensor([[0.9], [0.1], [0.5]]))
        bells = plots.plot_posteriors([moment]).axes[0].collections[0]
        blue_to_red = matplotlib.colormaps["turbo"]([0.95, 0.05, 0.5])
        np.testing.assert_allclose(bells.get_facecolors()[:, :3], blue_to_red[:, :3], atol=0.02)


class FlipBookTest(unittest.TestCase):
    def test_frames_still_and_label(self):
        shades = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
        data, metadata = displayed(plots.flip_book, shades.expand(3, 1, 32, 32), "place <on> it")
        frames = frames_of(data["text/html"])
        np.testing.assert_allclose(frames[:, 5, 5, 0], [0, 128, 255], atol=2)
        self.assertIn("place &lt;on&gt; it", data["text/html"])
        place = re.search(r"\) 0 ([\d.]+)%/100%", data["text/html"])[1]
        self.assertEqual(float(place), 50)  # the middle one of three, as the slider says
        with Image.open(io.BytesIO(data["image/png"])) as still:
            self.assertEqual(still.convert("L").getpixel((100, 100)), 128)  # the middle one
        self.assertGreater(len(metadata["image/png"]["alt"]), 20)


class ExplorerTest(unittest.TestCase):
    def test_each_slider_changes_the_picture(self):
        def decode(z):
            self.assertEqual(z.dtype, torch.float64)  # as the model computes
            grey = 0.5 + 0.1 * z[:, 0] + 0.01 * z.sum(1)
            return grey.view(1, 1, 1, 1).expand(1, 1, 32, 32)

        canvas, column = plots.explorer_widget(decode, torch.zeros(2).double()).children
        for slider, grey in zip(column.children, (155, 160), strict=True):
            slider.value = 1.0 if slider is column.children[0] else 2.0
            with Image.open(io.BytesIO(canvas.value)) as picture:
                self.assertAlmostEqual(picture.convert("L").getpixel((9, 9)), grey, delta=1)

    def test_widgets_where_somebody_can_move_them(self):
        """JupyterLab offers to answer input(), nbconvert does not; plain Python has no kernel."""
        for offered in (True, False, None):
            kernel = mock.Mock()
            kernel.get_parent.return_value = {"content": {"allow_stdin": offered}}
            shell = SimpleNamespace(kernel=None if offered is None else kernel)
            with (
                mock.patch.object(plots, "get_ipython", return_value=shell),
                mock.patch.object(plots, "display") as display,
                mock.patch("builtins.print") as printed,
            ):
                plots.explorer(lambda z: z.view(1, 1, 1, 1).clamp(0, 1), torch.zeros(1))
            self.assertEqual(display.called, bool(offered))
            self.assertEqual(printed.called, not offered)


class ListingTest(unittest.TestCase):
    def test_listings_name_file_and_line(self):
        with mock.patch.object(plots, "display") as display:
            plots.show_source(vae_lib.Encoder, vae_lib.Latent.forward)
        text = display.call_args.args[0].data
        for part in (vae_lib.Encoder, vae_lib.Latent.forward):
            source = inspect.getsource(part)
            self.assertIn(source, text)
            lines_before = inspect.getsource(vae_lib).split(source)[0].splitlines()
            self.assertIn(f"`vae_lib.py`, line {len(lines_before) + 1}\n", text)
        self.assertIn("class Latent(nn.Module):\n    ...\n\n    def forward", text)

    def test_a_file_that_changed_meanwhile_is_not_listed(self):
        with mock.patch.object(plots, "STARTED", 0):
            self.assertIn("`vae_lib.py` has changed", plots.listing(vae_lib.Encoder))
