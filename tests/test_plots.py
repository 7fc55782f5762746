"""Tests of plots.py: what figures, film, flip book and explorer show."""

import base64
import io
import re
import unittest
import warnings
from collections import namedtuple
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

import plots
import vae_lib

Losses = namedtuple("Losses", "loss reconstruction kl")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def vae_with(mu, sigma):
    """A stand-in for a VAE: these posteriors (N, D) for any images, and images as grey as z[0]."""
    logvar = 2 * torch.log(sigma)
    return SimpleNamespace(
        latent=vae_lib.Latent(mu.shape[1]),
        encoder=lambda images: (mu, logvar),
        decoder=lambda z: z[:, :1, None, None].expand(-1, 1, 32, 32).clamp(0, 1),
    )


def film_of(epochs, n=3, dim=1):
    """A film of so many epochs, of a model that does not change."""
    mu = torch.linspace(-1, 1, n).unsqueeze(1).expand(n, dim)
    vae = vae_with(mu, torch.full((n, dim), 0.1))
    film = plots.Film(vae, torch.zeros(n, 1, 32, 32), epochs)
    for epoch in range(epochs):
        film.record(Losses(30.0 - epoch, 20.0, 10.0))
    return film


def displayed(function, *arguments):
    """The data and the metadata of what the function displays."""
    with mock.patch.object(plots, "display") as display:
        function(*arguments)
    return display.call_args.args[0], display.call_args.kwargs.get("metadata")


def frames_of(page):
    """The frames of the sheet in a slider's page, (frames, H, W, 3) bytes."""
    png = base64.b64decode(re.search("url\\(data:image/png;base64,([^)]+)", page)[1])
    last = int(re.search('max="(\\d+)"', page)[1])
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return np.stack(np.split(sheet, last + 1))


class FigureTest(unittest.TestCase):
    def setUp(self):
        self.enterContext(warnings.catch_warnings())
        warnings.simplefilter("error")
        warnings.simplefilter("default", DeprecationWarning)  # inside matplotlib 3.9

    def test_image_grid(self):
        images = torch.rand(7, 1, 32, 32, generator=seeded(0))
        figure = plots.image_grid(images, columns=4, rows=["one", "two"], width=5)
        axes = figure.axes[0]
        grid = torch.tensor(np.array(axes.images[0].get_array()))  # with a border of 2 pixels
        for i, image in enumerate(images):
            top, left = 2 + i // 4 * 34, 2 + i % 4 * 34
            self.assertTrue(torch.equal(grid[top : top + 32, left : left + 32], image[0]))
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], ["one", "two"])
        self.assertEqual(axes.images[0].get_clim(), (0, 1))
        self.assertEqual(figure.get_size_inches()[0], 5)

    def test_rows(self):
        images = torch.rand(6, 1, 32, 32, generator=seeded(0))
        with mock.patch.object(plots, "show") as show:
            plots.show_rows({"above": images[:3], "below": images[3:]}, "two rows of three")
        figure, alt = show.call_args.args
        expected = plots.image_grid(images, 3, ["above", "below"])
        self.assertEqual(plots.to_png(figure), plots.to_png(expected))
        self.assertEqual(alt, "two rows of three")

    def test_losses_and_their_means(self):
        losses = [Losses(30.0, 20.0, 10.0)] * 99 + [Losses(9.0, 5.0, 4.0)]
        figure = plots.plot_losses(losses, mean_image=25.5, title="a title")
        axes = figure.axes[0]
        lines = [line for line in axes.lines if len(line.get_ydata()) == 100]
        ends = [tuple(line.get_ydata()[[0, -2, -1]]) for line in lines if line.get_alpha()]
        means = [tuple(line.get_ydata()[-2:]) for line in lines if not line.get_alpha()]
        self.assertEqual(ends, [(30, 30, 9), (20, 20, 5), (10, 10, 4)])
        self.assertEqual(means, [(30, 19.5), (20, 12.5), (10, 7)])  # of two epochs
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        expected = ["−ELBO 19.50", "reconstruction 12.50", "KL 7.00", "mean image 25.50"]
        self.assertEqual(labels, expected)
        self.assertIn(25.5, [line.get_ydata()[0] for line in axes.lines if line not in lines])
        self.assertEqual(axes.get_title(), "a title")

    def test_losses_of_one_epoch_and_of_zero_are_seen(self):
        for loss in (Losses(25.0, 25.0, 0.0), Losses(0.0, 0.0, 0.0), Losses(9.0, 5.0, 4.0)):
            figure = plots.plot_losses([loss], mean_image=0.0)
            plots.to_png(figure)  # without a warning
            axes = figure.axes[0]
            low, high = axes.get_ylim()
            for line in axes.lines[:-1:2]:
                self.assertTrue(low < line.get_ydata()[0] < high, loss)
                self.assertNotIn(line.get_marker(), ("", "None"))

    def test_show_gives_the_text_alternative(self):
        figure = plots.plot_losses([Losses(9.0, 5.0, 4.0)])
        picture, _ = displayed(plots.show, figure, "a line chart")
        data, metadata = picture._repr_mimebundle_()
        self.assertEqual(metadata["image/png"]["alt"], "a line chart")
        with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as image:
            self.assertEqual(image.size, (700, 360))
        handle = mock.Mock()
        plots.show(figure, "a line chart", handle)
        handle.update.assert_called_once()

    def test_live_losses_are_drawn_now_and_then_and_at_the_end(self):
        history = []
        with (
            mock.patch.object(plots, "display") as display,
            mock.patch("time.monotonic", side_effect=range(1000)),
        ):
            live = plots.LiveLosses(20)
            live.draw(history)  # stopped before the first epoch
            update = display.return_value.update
            update.assert_not_called()
            counts = []
            for _ in range(20):
                history.append(Losses(9.0, 5.0, 4.0))
                live.update(history)
                counts.append(update.call_count)
        self.assertEqual(counts[0], 1)
        self.assertEqual(counts[-1], counts[-2] + 1)
        self.assertLess(counts[-1], 12)
        display.assert_called_once()  # so that a single picture stays

    def test_live_passes_losses_on_until_the_stop_button(self):
        """With a drawing and a film of what there is by then."""

        def training():
            for epoch in range(3):
                yield Losses(9.0 - epoch, 5.0, 4.0 - epoch)
            raise KeyboardInterrupt

        film = mock.Mock()
        with (
            mock.patch.object(plots, "display") as display,
            mock.patch("builtins.print") as printed,
            mock.patch("time.monotonic", side_effect=range(0, 1000, 10)),
        ):
            try:
                found = list(plots.live(training(), 20, film))
            except KeyboardInterrupt:  # which would end the tests, too
                self.fail("live passed the stop button on")
        self.assertEqual([losses.loss for losses in found], [9.0, 8.0, 7.0])
        self.assertEqual([call.args for call in film.record.call_args_list], [(x,) for x in found])
        self.assertEqual(display.return_value.update.call_count, 4)  # 3 epochs, and the end
        self.assertIn("Stopped by hand", printed.call_args.args[0])


class FilmTest(unittest.TestCase):
    def test_moments(self):
        for epochs in (1, 2, 10, 47, 5000):
            film = film_of(epochs)
            chosen = [moment.epoch for moment in film.moments]
            self.assertEqual([chosen[0], chosen[-1]], [1, epochs])
            self.assertEqual(chosen, sorted(set(chosen)))
            self.assertLessEqual(len(chosen), 24)
            self.assertEqual([moment.loss for moment in film.moments], [31 - e for e in chosen])
        self.assertGreater(len(chosen), 20)  # of 5000
        self.assertLess(chosen[len(chosen) // 2], 1250)  # early ones are close together

    def test_any_number_of_images_and_dimensions(self):
        for n, dim in ((2, 1), (300, 1), (7, 2), (100, 8)):
            data, metadata = displayed(film_of(2, n, dim).show)
            frames = frames_of(data["text/html"])
            self.assertEqual(len(frames), 2)
            self.assertGreater(len(metadata["image/png"]["alt"]), 20)
            with Image.open(io.BytesIO(data["image/png"])) as still:
                self.assertEqual(still.size, (frames.shape[2], 3 * frames.shape[1]))

    def test_no_epoch_says_so(self):
        with mock.patch("builtins.print") as printed:
            film_of(0).show()
        self.assertIn("no film", printed.call_args.args[0])

    def test_bars_lie_where_the_posteriors_are(self):
        """Columns of the panel that are blue: three narrow posteriors part, three wide ones
        cover the middle of the prior."""
        same = torch.zeros(3, 1)
        apart = torch.tensor([[0.6745], [-0.6745], [0.0]])  # quarters of the prior, in disorder
        film = plots.Film(vae_with(same, torch.ones(3, 1)), torch.zeros(3, 1, 32, 32), 2)
        film.record(Losses(30.0, 20.0, 10.0))
        film.vae = vae_with(apart, torch.full((3, 1), 0.01))
        film.record(Losses(30.0, 20.0, 10.0))
        data, _ = displayed(film.show)
        first, last = frames_of(data["text/html"]).astype(int)
        box = np.argwhere(np.abs(first - [0, 114, 178]).max(2) < 60)  # rows, columns of bars
        left, right = box[:, 1].min(), box[:, 1].max()
        width = (right - left) / 0.9545  # two sigma to either side are so much of the prior
        blue = np.abs(last - [0, 114, 178]).max(2) < 60
        rows = np.flatnonzero(blue.any(1))
        centres = []
        for part in np.array_split(rows, 3):  # the three bars, from above
            columns = np.flatnonzero(blue[part].any(0))
            centres.append((columns.mean() - left) / width + 0.02275)
        np.testing.assert_allclose(centres, [0.25, 0.5, 0.75], atol=0.01)


class FlipBookTest(unittest.TestCase):
    def test_frames_still_and_label(self):
        shades = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
        images = shades.expand(3, 1, 32, 32)
        data, metadata = displayed(plots.flip_book, images, "place <on> the line")
        frames = frames_of(data["text/html"])
        np.testing.assert_allclose(frames[:, 5, 5, 0], [0, 128, 255], atol=2)
        self.assertIn("place &lt;on&gt; the line", data["text/html"])
        self.assertIn('data-lm-suppress-shortcuts="true"', data["text/html"])
        with Image.open(io.BytesIO(data["image/png"])) as still:
            self.assertEqual(still.size, (256, 256))
            self.assertEqual(still.convert("L").getpixel((100, 100)), 255)  # the last frame
        self.assertGreater(len(metadata["image/png"]["alt"]), 20)


class ExplorerTest(unittest.TestCase):
    def test_each_slider_changes_the_picture(self):
        def decode(z):
            grey = 0.5 + 0.1 * z[:, 0] + 0.01 * z.sum(1)
            return grey.view(1, 1, 1, 1).expand(1, 1, 32, 32)

        canvas, column = plots.explorer_widget(decode, latent_dim=3).children
        self.assertEqual(len(column.children), 3)
        for slider, grey in zip(column.children, (155, 160, 166), strict=True):
            before = canvas.value
            slider.value = 1.0 if slider is column.children[0] else 2.0
            self.assertNotEqual(canvas.value, before)
            with Image.open(io.BytesIO(canvas.value)) as picture:
                self.assertEqual(picture.size, (256, 256))
                self.assertAlmostEqual(picture.convert("L").getpixel((9, 9)), grey, delta=1)

    def test_widgets_where_somebody_can_move_them(self):
        """A kernel as JupyterLab asks it, which offers an answer to input(), and as nbconvert."""
        source = "import plots\nplots.explorer(lambda z: z.view(1, 1, 1, 1).clamp(0, 1), 1)"
        for offered in (True, False):
            notebook = new_notebook(cells=[new_code_cell(source)])
            client = NotebookClient(notebook, timeout=600, store_widget_state=False)
            client.config.KernelManager.transport_encryption = "auto"  # without it, a warning
            with client.setup_kernel():
                client.kc.allow_stdin = offered
                client.execute_cell(notebook.cells[0], 0)
            (output,) = notebook.cells[0].outputs
            if offered:
                self.assertIn("application/vnd.jupyter.widget-view+json", output.data)
            else:
                self.assertEqual((output.output_type, output.name), ("stream", "stdout"))
                self.assertRegex(output.text, r"^[A-Z].+\.\n$")

    def test_no_kernel(self):
        with mock.patch("builtins.print") as printed:
            plots.explorer(lambda z: z, 1)
        printed.assert_called_once()


if __name__ == "__main__":
    unittest.main()
