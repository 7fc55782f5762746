"""What a student may write: convolutions, dropout, batch norm, and losses that are nothing else.
It has eight latent dimensions where the test says so."""

import torch
from torch import nn


class Encoder(nn.Sequential):
    def __init__(self, images, latent_dim, hidden):
        super().__init__(
            nn.Conv2d(1, 4, 4, 2, 1),  # (N, 4, 16, 16)
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 4, 2, 1),  # (N, 8, 8, 8)
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(8 * 8 * 8, 2 * latent_dim),
        )

    def forward(self, x):
        return super().forward(x).chunk(2, 1)


class Latent(nn.Module):
    def forward(self, mu, logvar, generator=None):
        return torch.distributions.Normal(mu, (logvar / 2).exp()).rsample()


class Decoder(nn.Module):
    def __init__(self, images, latent_dim, hidden):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 8 * 8 * 8),
            nn.Unflatten(1, (8, 8, 8)),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 4, 2, 1),  # (N, 4, 16, 16)
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 4, 2, 1),  # (N, 1, 32, 32)
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.layers(z)


def reconstruction_loss(x, x_hat):
    return 0.5 * nn.functional.mse_loss(x_hat, x, reduction="none").flatten(1).sum(1)


def kl_divergence(mu, logvar):
    return 0.5 * (mu.pow(2) + logvar.exp() - logvar - 1)


def train(vae, images, epochs, *, batch_size=50, learning_rate=5e-3, seed=0):
    from types import SimpleNamespace

    vae.train()
    optimiser = torch.optim.Adam(vae.parameters(), learning_rate)
    for _ in range(epochs):
        total = 0
        for batch in images.split(batch_size):
            x_hat, mu, logvar = vae(batch)
            loss = (reconstruction_loss(batch, x_hat) + kl_divergence(mu, logvar).sum(1)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(batch) / len(images)
        yield SimpleNamespace(loss=total)
