import torch


def model():
    return torch.nn.LSTM(24, 16, batch_first=True)


def calibration():
    yield torch.randn(8, 5, 24, generator=torch.Generator().manual_seed(0))


def evaluate(model):
    return {"loss": float(model(torch.ones(1, 5, 24))[0].square().mean())}


higher_is_better = False
