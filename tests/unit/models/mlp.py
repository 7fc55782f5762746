"""What a student may write: fully connected layers of other names, the plain loss."""

import torch
from torch import nn

from vae_lib import SIZE, Losses


class Encoder(nn.Module):
    def __init__(self, images, latent_dim, hidden):
        super().__init__()
        self.first = nn.Linear(SIZE * SIZE, hidden)
        self.to_mu = nn.Linear(hidden, latent_dim)
        self.to_logvar = nn.Linear(hidden, latent_dim)

    def forward(self, x):
        h = torch.relu(self.first(x.flatten(1)))
        return self.to_mu(h), self.to_logvar(h)


class Latent(nn.Module):
    def forward(self, mu, logvar, generator=None):
        return mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator)


class Decoder(nn.Module):
    def __init__(self, images, latent_dim, hidden):
        super().__init__()
        self.first = nn.Linear(latent_dim, hidden)
        self.last = nn.Linear(hidden, SIZE * SIZE)

    def forward(self, z):
        return torch.sigmoid(self.last(torch.relu(self.first(z)))).view(-1, 1, SIZE, SIZE)


def reconstruction_loss(x, x_hat):
    return ((x - x_hat) ** 2).sum(dim=(-3, -2, -1)) / 2


def kl_divergence(mu, logvar):
    return (logvar.exp() + mu**2 - 1 - logvar) / 2


def train(vae, images, epochs, *, batch_size=None, learning_rate=5e-3, seed=0):
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(vae.parameters(), learning_rate)
    for _ in range(epochs):
        losses = []
        for x in images[torch.randperm(len(images))].split(batch_size or len(images)):
            x_hat, mu, logvar = vae(x)
            reconstruction = reconstruction_loss(x, x_hat).mean()
            kl = kl_divergence(mu, logvar).sum(1).mean()
            optimiser.zero_grad()
            (reconstruction + kl).backward()
            optimiser.step()
            losses.append([reconstruction.item() + kl.item(), reconstruction.item(), kl.item()])
        yield Losses(*torch.tensor(losses).mean(0).tolist())
